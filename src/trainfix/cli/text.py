"""Reports as plain text for people. Colour is added only where asked for; the words carry everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainfix import __version__
from trainfix.cli import base

if TYPE_CHECKING:
    from trainfix.cli.examine import Finding, Report

WIDTH = 118
_COLOURS = {"[X]": "31", "[!]": "33", "[OK]": "32", "[-]": "2"}
_MEANING = {
    base.OK: "nothing reachable is unrepaired",
    base.UNREPAIRED: "something reachable is not repaired",
    base.UNDECIDED: "could not decide",
}


def doctor_text(report: Report, *, colour: bool) -> str:
    """The report of doctor: one block per advisory, and a last line with the exit code and what it means."""
    packages = (
        ", ".join(f"{name} {version}" for name, version in report.packages.items()) or "no known package installed"
    )
    lines = [f"trainfix {__version__}, catalogue of {report.catalogue}, python {report.python}, {packages}"]
    lines += [line for remark in report.remarks for line in wrapped("note", remark, indent=0)]
    for finding in report.findings:
        lines += ["", *_finding(finding, report, colour)]
    lines += ["", _summary(report)]
    return "\n".join(lines) + "\n"


def _mark(finding: Finding, strict: bool) -> str:
    if finding.ignored is not None:
        return "[-]"
    code = finding.exit_code(strict=strict)
    if code == base.OK:
        doubtful = finding.verdict in ("affected", "unknown", "unverified") and finding.reachable != "no"
        return "[!]" if doubtful and not finding.repaired else "[OK]"
    return "[X]" if code == base.UNREPAIRED else "[!]"


def _finding(finding: Finding, report: Report, colour: bool) -> Iterator[str]:
    mark = _mark(finding, report.strict)
    shown = f"\033[{_COLOURS[mark]}m{mark}\033[0m" if colour else mark
    yield f"{shown}{' ' * (5 - len(mark))}{finding.advisory.id}  {finding.advisory.summary}"
    if finding.ignored is not None:
        yield from wrapped("ignored", finding.ignored)
    yield from wrapped("installed", _installed(finding))
    if finding.verdict not in ("affected", "unknown", "unverified"):
        return
    yield from _reachability(finding, asked=not report.configs)
    if finding.reachable != "no":
        yield from _ways_out(finding)


def _installed(finding: Finding) -> str:
    if finding.verdict == "not-installed":
        return f"{finding.advisory.package} is not installed"
    words = {
        "affected": "has this error",
        "not-affected": "does not have this error",
        "fixed-upstream": "has the repaired code",
        "fixed-by-source-patch": "was repaired with trainfix's source patch",
        "unverified": f"is newer than {finding.advisory.last_run}, the last release we ran, and its code is unknown",
        "unknown": "could not be judged: its code is not one that we know",
    }
    shape = f" (shape {finding.shape})" if finding.by == "shape" else ""
    return f"{finding.advisory.package} {finding.installed} {words[finding.verdict]}{shape}"


def _reachability(finding: Finding, asked: bool) -> Iterator[str]:
    label = {"yes": "reached", "no": "not reached", "unknown": "reached?"}[finding.reachable]
    for reason in finding.because:
        yield from wrapped(label, reason)
        label = ""
    if finding.reachable == "unknown" and asked:
        yield from wrapped("", "say which DeepSpeed config the run uses: trainfix doctor --config FILE")


def _ways_out(finding: Finding) -> Iterator[str]:
    advisory = finding.advisory
    if finding.repaired_by is not None:
        yield from wrapped("repaired", f"yes, by {finding.repaired_by}")
    elif finding.repair == "available":
        yield from wrapped("repair", "add `import trainfix  # noqa: F401` to the training script, anywhere in it")
    elif finding.repair == "refused":
        yield from wrapped("repair", "refused here")
    else:
        yield from wrapped("repair", "none yet")
    for note in finding.notes:
        yield from wrapped("note", note)
    if finding.repaired_by is None:
        yield from _upgrade(finding)
        yield from wrapped("config", advisory.ways_out["config"] or "")
        yield from wrapped("see", advisory.url)


def _upgrade(finding: Finding) -> Iterator[str]:
    advisory = finding.advisory
    if advisory.fixed_in is not None:
        yield from wrapped("upgrade", f"fixed in {advisory.package} {advisory.fixed_in}")
    for blocker in finding.blocked_by:
        extra = " in an extra" if blocker.strength == "extra" else ""
        yield from wrapped("blocked by", f"{blocker.by} requires {blocker.requires}{extra}")
    for hazard in advisory.hazards:
        yield from wrapped("hazard", hazard)


def wrapped(label: str, text: str, indent: int = 5) -> Iterator[str]:
    """`text` behind its label, folded to the width of a page with the label's column kept free."""
    if not text:
        return
    head = " " * indent + (f"{label + ':':<13}" if label else " " * 13)
    blank = " " * len(head)
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=blank, break_long_words=False, break_on_hyphens=False
    )


def _summary(report: Report) -> str:
    marks = [_mark(finding, report.strict) for finding in report.findings]
    code = report.exit_code
    if marks and set(marks) == {"[OK]"}:
        return f"all good: {len(marks)} checked, nothing reachable is unrepaired (exit 0)"
    words = {"[X]": "to repair", "[!]": "to look at", "[OK]": "fine", "[-]": "ignored"}
    counts = ", ".join(f"{marks.count(mark)} {word}" for mark, word in words.items() if mark in marks)
    return f"{counts}: exit {code} ({_MEANING[code]})"


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
