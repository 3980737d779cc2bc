"""The report of prove as plain text for people: a bar per micro-batch coefficient. The words carry everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainfix.cli import base
from trainfix.cli.text import WIDTH

_BAR = 12  # characters of a coefficient of 1
_COLUMN = 22
_PROVED = {
    base.OK: "every applicable error is gone with the repair",
    base.UNREPAIRED: "an error is still there with the repair",
    base.UNDECIDED: "could not be shown here",
}


def prove_text(proofs: Sequence[Mapping[str, Any]], code: int, *, colour: bool) -> str:
    """The proofs: one block each with a bar per micro-batch coefficient, and a last line with the exit code."""
    lines = [line for proof in proofs for line in (*_proof(proof, colour), "")]
    applicable = code != base.OK or any(proof["applicable"] for proof in proofs)
    said = _PROVED[code] if applicable else "none of these errors applies here"
    return "\n".join([*lines, f"{said} (exit {code})"]) + "\n"


def _proof(proof: Mapping[str, Any], colour: bool) -> Iterator[str]:
    installed = f" on {proof['package']} {proof['installed']}" if proof["installed"] else ""
    yield f"{proof['id']}{installed}: {_outcome(proof)}"
    yield from textwrap.wrap(proof["reason"] or "", WIDTH, initial_indent=" " * 5, subsequent_indent=" " * 5)
    runs = [(name, proof[key]) for name, key in (("without repair", "before"), ("with repair", "after")) if proof[key]]
    if not runs:
        return
    yield _row("micro-batch", [name for name, _ in runs])
    for number, values in enumerate(zip(*(run["coefficients"] for _, run in runs), strict=True), 1):
        yield _row(f"{number:>6}", [_bar(value, colour) for value in values])
    for key in ("relative_error", "cosine", "norm_ratio"):
        yield _row(key.replace("_", " "), [f"{run[key]:.3g}" for _, run in runs])


def _row(head: str, cells: Sequence[str]) -> str:
    return f"     {head:<16}" + "".join(f"{cell:<{_COLUMN}}" for cell in cells).rstrip()


def _outcome(proof: Mapping[str, Any]) -> str:
    if proof["applicable"] is False:
        return "not listed as affected, but the error shows" if proof["reproduced"] else "does not apply"
    if not proof["reproduced"]:
        return "the error did not show" if proof["reproduced"] is False else "could not be run"
    return {True: "shown, and gone with the repair", False: "shown, and NOT repaired", None: "shown"}[proof["repaired"]]


def _bar(coefficient: float, colour: bool) -> str:
    length = max(0, min(_BAR, round(coefficient * _BAR)))
    text = f"{'#' * length:<{_BAR}} {coefficient:6.3f}".ljust(_COLUMN)
    right = abs(coefficient - 1) <= 1e-3
    return f"\033[{'32' if right else '31'}m{text}\033[0m" if colour else text
