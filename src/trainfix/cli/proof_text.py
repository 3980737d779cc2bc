"""The report of prove as plain text for people: a bar per micro-batch coefficient. The words carry everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainfix.cli import base, page
from trainfix.environment.printable import printable

_BAR = 12  # characters of a coefficient of 1
_COLUMN = 22
_TOLERANCE = 1e-3  # how far a coefficient may be from right
_PROVED = {
    base.OK: "every applicable error is gone with the repair",
    base.UNREPAIRED: "an error is still there with the repair",
    base.UNDECIDED: "could not be shown here",
}
# What each proof says of itself, and what is said of how many of them.
_COUNTED = {
    "shown, and gone with the repair": "shown and gone with the repair",
    "shown, and NOT repaired": "shown and NOT repaired",
    "shown": "shown",
    "not listed as affected, but the error shows": "shown where it was not expected",
    "the error did not show": "not shown",
    "could not be run": "not run",
    "does not apply": "not in these releases",
}


def prove_text(proofs: Sequence[Mapping[str, Any]], code: int, *, colour: bool, width: int = page.WIDTH) -> str:
    """The proofs: one block each with a bar per micro-batch coefficient, and a last line with the exit code, which
    counts them where there are several."""
    lines = [line for proof in proofs for line in (*_proof(proof, colour, width), "")]
    applicable = code != base.OK or any(proof["applicable"] for proof in proofs)
    said = _PROVED[code] if applicable else "none of these errors applies here"
    if len(proofs) > 1:
        lines.append(f"{_counts(proofs)}:")
    return "\n".join([*lines, f"{said} (exit {code})"]) + "\n"


def in_one_line(proof: Mapping[str, Any]) -> str:
    """What one proof showed: ``6 of 8 micro-batches lost; gone with the repair``."""
    outcome, why = _outcome(proof), printable(proof["reason"] or "")
    if proof["reproduced"]:
        after = {True: "gone with the repair", False: "NOT gone with the repair", None: ""}[proof["repaired"]]
        parts = [_damage(proof["before"]), after, why]
    else:
        parts = [outcome, why]
    return "; ".join(part for part in parts if part)


def _damage(run: Mapping[str, Any] | None) -> str:
    """How many micro-batches do not count as they should."""
    values = run["coefficients"] if run else []
    lost = [value for value in values if abs(value) <= _TOLERANCE]
    wrong = [value for value in values if abs(value) > _TOLERANCE and abs(value - 1) > _TOLERANCE]
    if lost and not wrong:
        return f"{len(lost)} of {len(values)} micro-batches lost"
    if wrong:
        extent = f"{len(wrong)} of {len(values)} micro-batches count wrongly ({min(wrong):.2f} to {max(wrong):.2f})"
        return f"{extent}, {len(lost)} lost" if lost else extent
    return f"the gradient is wrong by {run['relative_error']:.2g} of its norm" if run else "shown"


def _counts(proofs: Sequence[Mapping[str, Any]]) -> str:
    outcomes = [_outcome(proof) for proof in proofs]
    return ", ".join(f"{outcomes.count(one)} {words}" for one, words in _COUNTED.items() if one in outcomes)


def _proof(proof: Mapping[str, Any], colour: bool, width: int) -> Iterator[str]:
    installed = f" on {proof['package']} {proof['installed']}" if proof["installed"] else ""
    yield printable(f"{proof['id']}{installed}: {_outcome(proof)}")
    reason, margin = printable(proof["reason"] or ""), " " * 5
    yield from textwrap.wrap(reason, width, initial_indent=margin, subsequent_indent=margin)
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
    right = abs(coefficient - 1) <= _TOLERANCE
    return f"\033[{'32' if right else '31'}m{text}\033[0m" if colour else text
