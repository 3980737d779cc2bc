"""The report of doctor as plain text for people. Colour is added only where asked for; the words carry everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from trainfix import __version__
from trainfix.cli import base

if TYPE_CHECKING:
    from trainfix.cli.examine import Finding, Report

WIDTH = 118
_COLOURS = {"[X]": "31", "[!]": "33", "[OK]": "32", "[-]": "2"}
_SEVERITIES = ("gradient", "scale", "precision", "metric", "default")
_LEVELS = ("proved", "read", "reported")
_MEANING = {
    base.OK: "nothing reachable is unrepaired",
    base.UNREPAIRED: "something reachable is not repaired",
    base.UNDECIDED: "could not decide",
}


def doctor_text(report: Report, *, colour: bool) -> str:
    """The report of doctor: a block for each finding that needs attention, a line or less for the others."""
    waiting = sorted((one for one in report.findings if not one.settled), key=_gravity)
    full = [one for one in waiting if _is_full(one, report)]
    if report.detailed:
        full = sorted(report.findings, key=_gravity)
    sections = [
        _head(report, bool(waiting)),
        *(_block(finding, report, colour) for finding in full),
        _brief([one for one in waiting if one not in full], report, colour),
        _moving(full, report),
        _in_force(report),
        [*_rest([one for one in report.findings if one.settled and one not in full], report), _summary(report)],
    ]
    texts = ["\n".join(lines) for lines in map(list, sections) if lines]
    return "\n\n".join(texts) + "\n"


def _gravity(finding: Finding) -> tuple[object, ...]:
    """What is grave, certain and reached comes first."""
    severity, level = finding.advisory.severity, finding.advisory.evidence_level
    certain = (finding.reachable != "yes", _SEVERITIES.index(severity), _LEVELS.index(level))
    return (finding.settled, not finding.counts, *certain, finding.advisory.id)


def _is_full(finding: Finding, report: Report) -> bool:
    """Whether it gets a block: what is reached, and what is grave. Without a config, of the latter only what can be
    repaired: the run may reach none of it."""
    if finding.reachable == "yes":
        return True
    return finding.counts and (bool(report.configs) or finding.advisory.fix is not None)


def _mark(finding: Finding, report: Report) -> str:
    if finding.ignored is not None:
        return "[-]"
    if finding.settled:
        return "[OK]"
    return "[X]" if finding.exit_code(strict=report.strict) == base.UNREPAIRED else "[!]"


def _title(finding: Finding, report: Report, colour: bool, text: str) -> Iterator[str]:
    """The mark, the id, and `text` folded behind them."""
    mark = _mark(finding, report)
    head = f"{mark:<5}{finding.advisory.id}  "
    lines = _folded(text, head, " " * len(head))
    yield lines[0].replace(mark, f"\033[{_COLOURS[mark]}m{mark}\033[0m", 1) if colour else lines[0]
    yield from lines[1:]


def _head(report: Report, waiting: bool) -> Iterator[str]:
    packages = ", ".join(f"{name} {version}" for name, version in report.packages.items())
    said = packages or "no known package installed"
    yield from _folded(
        f"trainfix {__version__}, catalogue of {report.catalogue}, python {report.python}, {said}", "", "  "
    )
    for remark in report.remarks:
        yield from wrapped("note", remark, indent=0)
    if waiting and not report.configs:
        ask = "no config was given, so what the run reaches is not known: trainfix doctor --config FILE"
        yield from wrapped("note", ask, indent=0)


def _block(finding: Finding, report: Report, colour: bool) -> Iterator[str]:
    yield from _title(finding, report, colour, finding.advisory.summary)
    if finding.ignored is not None:
        yield from wrapped("ignored", finding.ignored)
    yield from wrapped("installed", _installed(finding))
    if finding.verdict not in ("affected", "unknown", "unverified"):
        return
    label = {"yes": "reached", "no": "not reached", "unknown": "reached?"}[finding.reachable]
    for number, reason in enumerate(finding.because):
        yield from wrapped("" if number else label, reason)
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


def _ways_out(finding: Finding) -> Iterator[str]:
    advisory = finding.advisory
    if advisory.evidence_level != "proved":
        known = {"read": "read in the source; no experiment of ours shows it", "reported": "reported by others"}
        yield from wrapped("evidence", known[advisory.evidence_level])
    if finding.repaired_by is not None:
        yield from wrapped("repaired", f"yes, by {finding.repaired_by}")
    elif finding.repair == "available" and advisory.severity == "precision":
        call = f'call `trainfix.apply("{advisory.id}")` in the training script'
        yield from wrapped("repair", f"{call}: a loss of precision is repaired by name only")
    elif finding.repair == "available":
        yield from wrapped("repair", "add `import trainfix  # noqa: F401` to the training script, anywhere in it")
    elif finding.repair == "refused":
        yield from wrapped("repair", "refused here")
    else:
        watched = "; with `import trainfix`, a run that reaches it is told" if advisory.fix is not None else ""
        yield from wrapped("repair", f"none yet{watched}")
    for note in finding.notes:
        yield from wrapped("note", note)
    if finding.repaired_by is not None:
        return
    fixed, package = advisory.fixed_in, advisory.package
    yield from wrapped("upgrade", f"fixed in {package} {fixed}" if fixed else f"no release of {package} repairs it yet")
    for blocker in finding.blocked_by:
        extra = " in an extra" if blocker.strength == "extra" else ""
        yield from wrapped("blocked by", f"{blocker.by} requires {blocker.requires}{extra}")
    yield from wrapped("config", advisory.ways_out["config"] or "")
    yield from wrapped("see", advisory.url)


def _brief(findings: Sequence[Finding], report: Report, colour: bool) -> Iterator[str]:
    """One line for each finding that gets no block."""
    if findings:
        yield "perhaps reached too (in full with --only ID):"
    for finding in findings:
        advisory = finding.advisory
        why = advisory.severity if advisory.evidence_level == "proved" else advisory.evidence_level
        text = f"{why}: {advisory.summary}"
        yield from _title(finding, report, colour, textwrap.shorten(text, WIDTH - 14, placeholder=" ..."))


def _moving(findings: Iterable[Finding], report: Report) -> Iterator[str]:
    """What else the upgrades named above would change."""
    open_ = [one for one in findings if one.hazards and not one.settled]
    changes = list(dict.fromkeys(hazard for one in open_ for hazard in one.hazards))
    said = changes if report.configs else [hazard for hazard in changes if not hazard.triggers]
    if not changes:
        return
    yield f"an upgrade of {' and '.join(dict.fromkeys(one.package for one in changes))} also changes silently:"
    for hazard in said:
        yield from _item(hazard.change)
    if len(said) < len(changes):
        yield from _item(f"{len(changes) - len(said)} more, depending on the config")


def _in_force(report: Report) -> Iterator[str]:
    """The changed defaults that rule these runs now, the newest first."""
    newest_first = report.hazards[::-1]
    certain = [one.in_force(report.packages[one.package], config) for one, config in newest_first if not one.triggers]
    possible = dict.fromkeys(str(one.key) for one, _ in newest_first if one.triggers)
    if newest_first:
        yield "defaults in force that older releases did not have:"
    for text in certain:
        yield from _item(text)
    if possible:
        yield from _item(f"{'and, ' if certain else ''}depending on what the configs leave open: {', '.join(possible)}")


def _item(text: str) -> Iterator[str]:
    yield from _folded(text, "  - ", "    ")


def _rest(findings: Sequence[Finding], report: Report) -> Iterator[str]:
    """What needs no attention, in as few lines as possible."""
    groups: dict[tuple[int, str], list[str]] = {}
    for finding in findings:
        groups.setdefault(_why_settled(finding, report), []).append(finding.advisory.id)
    for (_, why), ids in sorted(groups.items()):
        yield from _folded(f"{why}: {_spans(ids)}", "", "  ")


def _why_settled(finding: Finding, report: Report) -> tuple[int, str]:
    """The line that names the finding, and its place among those lines."""
    package = finding.advisory.package
    release = f"{package} {finding.installed}"
    if finding.ignored is not None:
        return 0, f"[-]  ignored ({finding.ignored})"
    if finding.verdict == "not-installed":
        missing = dict.fromkeys(one.advisory.package for one in report.findings if one.verdict == "not-installed")
        return 5, f"{_listed(missing)} not installed"
    if finding.verdict == "fixed-by-source-patch":
        return 3, f"repaired with trainfix's source patch in {release}"
    if finding.verdict in ("not-affected", "fixed-upstream"):
        return 4, f"not in {release}"
    if finding.reachable == "no":
        return 2, f"not reached by {', '.join(report.configs)}"
    return 1, f"repaired by {finding.repaired_by}"


def _listed(packages: Iterable[str]) -> str:
    """``deepspeed is`` or ``openrlhf and trl are``."""
    *most, last = packages
    return f"{', '.join(most)} and {last} are" if most else f"{last} is"


def _spans(ids: Sequence[str]) -> str:
    """``TF-0001, TF-0003 to TF-0005``."""
    runs: list[list[str]] = []
    for one in ids:
        if runs and int(one[-4:]) == int(runs[-1][-1][-4:]) + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def wrapped(label: str, text: str, indent: int = 5) -> Iterator[str]:
    """`text` behind its label, folded to the width of a page with the label's column kept free."""
    head = " " * indent + (f"{label + ':':<13}" if label else " " * 13)
    if text:
        yield from _folded(text, head, " " * len(head))


def _folded(text: str, head: str, margin: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )


def _summary(report: Report) -> str:
    marks = [_mark(finding, report) for finding in report.findings]
    code = report.exit_code
    if marks and set(marks) == {"[OK]"}:
        return f"all good: {len(marks)} checked, nothing reachable is unrepaired (exit 0)"
    words = {"[X]": "to repair", "[!]": "to look at", "[OK]": "fine", "[-]": "ignored"}
    counts = ", ".join(f"{marks.count(mark)} {word}" for mark, word in words.items() if mark in marks)
    meaning = "what is to look at counts only with --strict" if code == base.OK and "[!]" in marks else _MEANING[code]
    return f"{counts}: exit {code} ({meaning})"
