"""The report of doctor for people: grouped by package, a block for what needs attention, a line for the rest."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from trainfix import __version__
from trainfix.cli import base, page
from trainfix.cli.page import Entry, row
from trainfix.cli.proof_text import in_one_line

if TYPE_CHECKING:
    from trainfix.cli.examine import Finding, Report
    from trainfix.environment.blockers import Blocker

IMPORT = "add `import trainfix  # noqa: F401` to the training script"
_SEVERITIES = ("gradient", "scale", "precision", "metric", "default")
_LEVELS = ("proved", "read", "reported")
_WORDS = {"[X]": "to repair", "[!]": "to look at", "[OK]": "fine", "[-]": "ignored"}
_MEANING = {
    base.OK: "nothing reachable is unrepaired",
    base.UNREPAIRED: "something reachable is not repaired",
    base.UNDECIDED: "could not decide",
}
_VERDICTS = {
    "affected": "has this error",
    "not-affected": "does not have this error",
    "fixed-upstream": "has the repaired code",
    "fixed-by-source-patch": "was repaired with trainfix's source patch",
    "unknown": "could not be judged: its code is not one that we know",
}
_DEMANDS = {
    "requires": "{by} requires {requires}",
    "extra": "{by} requires {requires} in an extra",
    "runtime-check": "{by} checks for {requires} when it starts{off}",
    "recommends": "{by} recommends {requires}",
}


def doctor_text(report: Report, *, colour: bool, width: int = page.WIDTH) -> str:
    """The report of doctor, `width` columns wide. With `colour` it is meant for a terminal."""
    return page.render(_sections(report, width), width=width, colour=colour)


def _sections(report: Report, width: int) -> Iterator[Iterable[Entry]]:
    full, brief = attention(report)
    yield _head(report, any(not one.settled for one in (*full, *brief)))
    for package in dict.fromkeys(one.advisory.package for one in (*full, *brief)):
        mine, mine_brief = ([one for one in those if one.advisory.package == package] for those in (full, brief))
        yield from _group(mine, mine_brief, report, width)
    yield _in_force(report)
    rest = [one for one in report.findings if one not in full and one not in brief]
    yield [*_where_to_read_on(full), *_rest(rest, report, width), _summary(report)]


def attention(report: Report) -> tuple[list[Finding], list[Finding]]:
    """The findings to tell in full, and those that a line will do for; the gravest first."""
    waiting = sorted((one for one in report.findings if not one.settled), key=_gravity)
    full = (
        sorted(report.findings, key=_gravity) if report.detailed else [one for one in waiting if _is_full(one, report)]
    )
    return full, [one for one in waiting if one not in full]


def _gravity(finding: Finding) -> tuple[object, ...]:
    """What is grave, certain and reached comes first."""
    severity, level = finding.advisory.severity, finding.advisory.evidence_level
    certain = (finding.reachable != "yes", _SEVERITIES.index(severity), _LEVELS.index(level))
    return (finding.settled, not finding.counts, *certain, finding.advisory.id)


def _is_full(finding: Finding, report: Report) -> bool:
    """Whether it gets a block: what is reached, and what is grave. Without a config, of the latter only what can be
    repaired, and nothing of a package that the run may not use at all: it may reach none of it."""
    if finding.reachable == "yes":
        return True
    return finding.counts and not finding.program_unsaid and (bool(report.configs) or finding.advisory.fix is not None)


def mark_of(finding: Finding, report: Report) -> str:
    """``[X]`` to repair, ``[!]`` to look at, ``[OK]`` fine, ``[-]`` ignored."""
    if finding.ignored is not None:
        return "[-]"
    if finding.settled:
        return "[OK]"
    return "[X]" if finding.exit_code(strict=report.strict) == base.UNREPAIRED else "[!]"


def counts_of(findings: Iterable[Finding], report: Report) -> str:
    """How many findings have which mark: ``1 to repair, 2 to look at``."""
    marks = [mark_of(finding, report) for finding in findings]
    return ", ".join(f"{marks.count(mark)} {word}" for mark, word in _WORDS.items() if mark in marks)


def verdict_of_all(report: Report) -> str:
    """The counts, the exit code and what it means."""
    marks = [mark_of(finding, report) for finding in report.findings]
    code = report.exit_code
    if marks and set(marks) == {"[OK]"}:
        return f"all good: {len(marks)} checked, nothing reachable is unrepaired (exit 0)"
    meaning = "what is to look at counts only with --strict" if code == base.OK and "[!]" in marks else _MEANING[code]
    return f"{counts_of(report.findings, report)}: exit {code} ({meaning})"


def installed_of(report: Report) -> str:
    """The examined packages with their releases."""
    return ", ".join(f"{name} {version}" for name, version in report.packages.items()) or "no known package installed"


def remarks_of(report: Report) -> Iterator[str]:
    """What to know of the installation, and of the way in which it was examined, before reading the findings."""
    if report.lock:
        yield f"by version only: {report.lock} names the releases, and no installed code was looked at"
    if report.site:
        yield f"examined are the packages in {report.site}"
    yield from report.remarks


def files_of(report: Report) -> list[str]:
    """The config files, each once; one run may be configured by several, named ``train.yaml + ds.json``."""
    return list(dict.fromkeys(file for config in report.configs for file in config.split(" + ")))


def proof_of(finding: Finding, report: Report) -> str:
    """What the experiment showed here, in one line; empty if there was none."""
    proof = report.proofs.get(finding.advisory.id)
    return in_one_line(proof) if proof else ""


def _head(report: Report, waiting: bool) -> Iterator[Entry]:
    python = f"python {report.python}, " if report.python else ""
    about = f"trainfix {__version__}, catalogue of {report.catalogue}, {python}{installed_of(report)}"
    yield Entry(about, margin=2, look="opening")
    for remark in remarks_of(report):
        yield row("note", remark, indent=0)
    if waiting and not report.configs:
        ask = "no config was given, so what the run reaches is not known: trainfix doctor --config FILE"
        yield row("note", ask, indent=0)
    unsaid = [one for one in report.findings if one.program_unsaid and not one.settled]
    if unsaid:
        files = files_of(report)
        ask = f"{', '.join(files)} {'does' if len(files) == 1 else 'do'} not say which program trains"
        errors = f"{len(unsaid)} error{'s' if len(unsaid) > 1 else ''}"
        yield row("note", f"{ask}: give its own config too (--config), for a clear answer about {errors}", indent=0)


def _group(full: Sequence[Finding], brief: Sequence[Finding], report: Report, width: int) -> Iterator[Iterable[Entry]]:
    """All that is to say about one package."""
    first = (*full, *brief)[0]
    package = first.advisory.package
    if first.verdict == "not-installed":
        yield [Entry(f"{package} is not installed", look="group")]
    else:
        yield [Entry(f"{release_of(first)}: {counts_of((*full, *brief), report)}", look="group")]
    notes = _shared_notes(full)
    for finding in full:
        yield _block(finding, report, notes)
    yield [Entry(note, f"{_spans(ids)}: ", 2) for note, ids in notes.items()]
    yield _brief(brief, report, width)
    yield _moving(full, report)


def _shared_notes(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """note -> ids, of the notes that stand for several findings: they are said once, below the blocks. Why a repair is
    refused stays with it."""
    ids: dict[str, list[str]] = {}
    for finding in findings:
        for note in finding.notes if finding.repair != "refused" else ():
            ids.setdefault(note, []).append(finding.advisory.id)
    return {note: those for note, those in ids.items() if len(those) > 1}


def _title(finding: Finding, report: Report, text: str, look: page.Look) -> Entry:
    """The mark, the id, and `text` folded behind them."""
    mark = mark_of(finding, report)
    head = f"{mark:<5}{finding.advisory.id}  "
    return Entry(text, head, len(head), look, mark, finding.advisory.url)


def _block(finding: Finding, report: Report, said: Iterable[str]) -> Iterator[Entry]:
    """One finding; the notes in `said` are told elsewhere."""
    yield _title(finding, report, finding.advisory.summary, "title")
    yield row("ignored", finding.ignored or "")
    if report.detailed or finding.verdict != "affected":
        yield row("installed", installed_as(finding))
    if finding.verdict not in ("affected", "unknown", "unverified"):
        return
    label = {"yes": "reached", "no": "not reached", "unknown": "reached?"}[finding.reachable]
    for number, reason in enumerate(reasons_of(finding)):
        yield row("" if number else label, reason)
    if finding.reachable != "no":
        yield row("proved here", proof_of(finding, report))
        yield from (row(label, text) for label, text in ways_out(finding, proved=bool(proof_of(finding, report))))
        yield from (row("note", note) for note in finding.notes if note not in said)


def release_of(finding: Finding) -> str:
    """The package and its installed release."""
    package = finding.advisory.package
    if finding.verdict == "not-installed":
        return f"{package} (not installed)"
    return f"{package} {finding.installed}" if finding.installed is not None else f"{package} of an unknown release"


def installed_as(finding: Finding) -> str:
    """The installed release and the verdict on it."""
    if finding.verdict == "not-installed":
        return f"{finding.advisory.package} is not installed"
    if finding.installed is None:
        return f"{release_of(finding)}: it could not be judged"
    newer = f"is newer than {finding.advisory.last_run}, the last release we ran, and its code is unknown"
    shape = f" (shape {finding.shape})" if finding.by == "shape" else ""
    return f"{finding.advisory.package} {finding.installed} {_VERDICTS.get(finding.verdict, newer)}{shape}"


def reasons_of(finding: Finding) -> list[str]:
    """What decides whether the run reaches it. What one file says, or leaves open, stands together:
    ``a = 1, b = 2 (ds.json)``."""
    together: dict[tuple[str, str], list[str]] = {}
    for reason in finding.because:
        head, said, place = _parted(reason)
        together.setdefault((head, place), []).append(said)
    return [f"{head}{', '.join(said)}{place}" for (head, place), said in together.items()]


def _parted(reason: str) -> tuple[str, str, str]:
    """What is common to all that one file says, or leaves open, around what it is. The rest stands alone."""
    if found := re.fullmatch(r"(.+ does not say )(.+)", reason):
        return found[1], found[2], ""
    if found := re.fullmatch(r"(.*)( \([^()]+\))", reason):
        return "", found[1], found[2]
    return reason, "", ""


def ways_out(finding: Finding, *, proved: bool = False) -> Iterator[tuple[str, str]]:
    """(label, text) of what is known and what can be done, a line each. `proved`: by an experiment on this machine."""
    advisory = finding.advisory
    if advisory.evidence_level != "proved" and not proved:
        known = {"read": "read in the source; no experiment of ours shows it", "reported": "reported by others"}
        yield "evidence", known[advisory.evidence_level]
    if finding.repaired_by is not None:
        yield "repaired", f"yes, by {finding.repaired_by}"
        return
    yield "repair", _repair(finding)
    fixed, package = advisory.fixed_in, advisory.package
    upgrade = f"fixed in {package} {fixed}" if fixed else f"no release of {package} repairs it yet"
    against = "; ".join(demand_of(blocker) for blocker in finding.blocked_by)
    yield "upgrade", f"{upgrade}, but {against}" if against else upgrade
    yield "config", advisory.ways_out["config"] or ""


def _repair(finding: Finding) -> str:
    """What repairs it here: a sentence of ours, with its code in backticks."""
    advisory = finding.advisory
    if finding.repair == "refused":
        return "refused here"
    if finding.repair == "none":
        return "none yet" + ("; with `import trainfix`, a run that reaches it is told" if advisory.fix else "")
    if advisory.severity == "precision":
        call = f'call `trainfix.apply("{advisory.id}")` in the training script'
        return f"{call}: a loss of precision is repaired by name only"
    return IMPORT


def demand_of(blocker: Blocker) -> str:
    """Who stands in the way of an upgrade, and how strongly."""
    off = f" ({blocker.off} switches the check off)" if blocker.off is not None else ""
    return _DEMANDS[blocker.strength].format(by=blocker.by, requires=blocker.requires, off=off)


def _brief(findings: Sequence[Finding], report: Report, width: int) -> Iterator[Entry]:
    """One line for each finding that gets no block."""
    if findings:
        yield Entry("perhaps reached too (in full with --only ID):")
    for finding in findings:
        advisory = finding.advisory
        why = advisory.severity if advisory.evidence_level == "proved" else advisory.evidence_level
        text = f"{why}: {advisory.summary}"
        yield _title(finding, report, textwrap.shorten(text, width - 14, placeholder=" ..."), "line")


def upgrade_changes(findings: Iterable[Finding], report: Report) -> dict[str, list[str]]:
    """package -> what else its upgrade would change silently, a sentence each, for the findings that one repairs."""
    open_ = [one for one in findings if not one.settled]
    changes: dict[str, list[str]] = {}
    left_out: dict[str, int] = {}
    for hazard in dict.fromkeys(hazard for one in open_ for hazard in one.hazards):
        said = changes.setdefault(hazard.package, [])
        if report.configs or not hazard.triggers:
            said.append(hazard.change)
        else:
            left_out[hazard.package] = left_out.get(hazard.package, 0) + 1
    for package, number in left_out.items():
        changes[package].append(f"{number} more, depending on the config")
    return changes


def _moving(findings: Iterable[Finding], report: Report) -> Iterator[Entry]:
    for package, changes in upgrade_changes(findings, report).items():
        yield Entry(f"an upgrade of {package} also changes silently:")
        yield from map(_item, changes)


def _in_force(report: Report) -> Iterator[Entry]:
    """The changed defaults that rule these runs now, the newest first."""
    newest_first = report.hazards[::-1]
    certain = [one.in_force(report.packages[one.package], config) for one, config in newest_first if not one.triggers]
    possible = dict.fromkeys(str(one.key) for one, _ in newest_first if one.triggers)
    if newest_first:
        yield Entry("defaults in force that older releases did not have:")
    for text in certain:
        yield _item(text)
    if possible:
        yield _item(f"{'and, ' if certain else ''}depending on what the configs leave open: {', '.join(possible)}")


def _item(text: str) -> Entry:
    return Entry(text, "  - ", 4)


def _where_to_read_on(full: Sequence[Finding]) -> Iterator[Entry]:
    if any(not one.settled for one in full):
        yield Entry("more about each: trainfix show ID")


def _rest(findings: Sequence[Finding], report: Report, width: int) -> Iterator[Entry]:
    """What needs no attention, in as few lines as possible: where the ids of an error that is not there would take
    more than one, they are counted."""
    groups: dict[tuple[int, str], list[str]] = {}
    for finding in findings:
        groups.setdefault(_why_settled(finding, report), []).append(finding.advisory.id)
    for (place, why), ids in sorted(groups.items()):
        text = f"{why}: {_spans(ids)}"
        absent = place >= _ABSENT
        yield Entry(f"{why}: {len(ids)} known errors" if absent and len(text) > width else text, margin=2)


_ABSENT = 4  # the place of the first line about errors that the installation does not have


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
        return _ABSENT, f"not in {release}"
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


def _summary(report: Report) -> Entry:
    marks = {mark_of(finding, report) for finding in report.findings}
    gravest = next((mark for mark in _WORDS if mark in marks), "[OK]")
    return Entry(verdict_of_all(report), look="count", mark=gravest)
