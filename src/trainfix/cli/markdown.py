"""The report of doctor as Markdown: for a pull request, and as a block to paste into an issue.

What comes from examined files stands in code spans, out of which nothing breaks: no markup, no mention, no link.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainfix import __version__
from trainfix.cli.text import (
    attention,
    files_of,
    installed_as,
    mark_of,
    proof_of,
    reasons_of,
    release_of,
    remarks_of,
    upgrade_changes,
    verdict_of_all,
    ways_out,
)
from trainfix.environment.printable import printable

if TYPE_CHECKING:
    from trainfix.cli.examine import Finding, Report

_WORDS = {"[X]": "**to repair**", "[!]": "to look at", "[OK]": "fine", "[-]": "ignored"}


def doctor_markdown(report: Report) -> str:
    """The report of doctor: a table of what needs attention, the details folded away below it."""
    full, brief = attention(report)
    ignored = [one for one in report.findings if one.ignored is not None and one not in full]
    shown = [*full, *brief, *ignored]
    parts = [
        f"### trainfix doctor: {plain(verdict_of_all(report))}",
        "\n".join(f"- {line}" for line in _about(report)),
        "\n".join(_table(shown, report)),
        *("\n".join(_details(finding, report)) for finding in shown),
        *("\n".join(_changes(package, changes)) for package, changes in upgrade_changes(shown, report).items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def issue_block(report: Report) -> str:
    """A block to paste into an upstream issue: releases, the settings that decide, verdicts, what was measured here.

    No folder of this machine is in it: files are named without theirs.
    """
    full, brief = attention(report)
    told = [one for one in full if one.reachable != "no" and one.ignored is None]
    remarks = [f"- {code(_without_folders(remark, report))}" for remark in report.remarks]
    lines = ["### Found by `trainfix doctor`", "", f"- {_versions(report)}", *remarks]
    if not told and not brief:
        lines += ["", "No known silent error is reached without repair."]
    for finding in told:
        advisory = finding.advisory
        reached = "reached" if finding.reachable == "yes" else "perhaps reached"
        lines += ["", f"**[{advisory.id}]({advisory.url})** {plain(advisory.summary)}", ""]
        lines.append(f"- {plain(installed_as(finding))}; {reached}")
        lines += [f"- {code(_without_folders(reason, report))}" for reason in reasons_of(finding)]
        if proof := _without_folders(proof_of(finding, report), report):
            lines.append(f"- by `trainfix prove {advisory.id}` on this machine: {code(proof)}")
    if brief:
        links = ", ".join(f"[{one.advisory.id}]({one.advisory.url})" for one in brief)
        lines += ["", f"Perhaps reached too: {links}"]
    return "\n".join(lines) + "\n"


def _about(report: Report) -> Iterator[str]:
    yield _versions(report)
    if report.configs:
        yield f"configs: {', '.join(code(config) for config in report.configs)}"
    yield from (code(remark) for remark in remarks_of(report))


def _versions(report: Report) -> str:
    packages = [f"{name} {version}" for name, version in report.packages.items()]
    python = [f"python {report.python}"] if report.python else []
    trainfix = f"trainfix {__version__}, catalogue of {report.catalogue}"
    return plain("; ".join([", ".join([*packages, *python]), trainfix]).removeprefix("; "))


def _table(findings: Iterable[Finding], report: Report) -> Iterator[str]:
    rows = [
        (
            _WORDS[mark_of(finding, report)],
            f"[{finding.advisory.id}]({finding.advisory.url})",
            code(release_of(finding), cell=True),
            plain(finding.advisory.summary),
            finding.reachable,
            _repair(finding),
        )
        for finding in findings
    ]
    if rows:
        yield "| | advisory | package | error | reached | repair |"
        yield "|---|---|---|---|---|---|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _repair(finding: Finding) -> str:
    """What repairs it, in two words."""
    if finding.repaired_by is not None:
        return f"by {plain(finding.repaired_by)}"
    if finding.repair == "available":
        return "by name" if finding.advisory.severity == "precision" else "`import trainfix`"
    return {"refused": "refused here", "none": "none yet"}[finding.repair]


def _details(finding: Finding, report: Report) -> Iterator[str]:
    advisory, proof = finding.advisory, proof_of(finding, report)
    label = {"yes": "reached", "no": "not reached", "unknown": "perhaps reached"}[finding.reachable]
    yield f"<details><summary>{advisory.id}: {html.escape(printable(advisory.summary))}</summary>"
    yield ""
    yield f"- installed: {plain(installed_as(finding))}"
    yield from (f"- {label}: {code(reason)}" for reason in reasons_of(finding))
    if finding.ignored is not None:
        yield f"- ignored: {code(finding.ignored)}"
    if proof:
        yield f"- proved here: {code(proof)}"
    if finding.reachable != "no":
        yield from (f"- {label}: {_way(label, text)}" for label, text in ways_out(finding, proved=bool(proof)) if text)
        yield from (f"- note: {code(note)}" for note in finding.notes)
    yield f"- see: <{advisory.url}>"
    yield ""
    yield "</details>"


def _changes(package: str, changes: Iterable[str]) -> Iterator[str]:
    yield f"<details><summary>An upgrade of {package} also changes silently</summary>"
    yield ""
    yield from (f"- {plain(change)}" for change in changes)
    yield ""
    yield "</details>"


def _way(label: str, text: str) -> str:
    """A way out; our own sentence about the repair has its code in backticks already."""
    return text if label == "repair" else plain(text)


def code(text: str, *, cell: bool = False) -> str:
    """`text` as a code span that holds it whole; with `cell` for a table, whose bars come first."""
    shown = printable(text).strip() or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    span = f"{fence}{pad}{shown}{pad}{fence}"
    return span.replace("|", "\\|") if cell else span


def plain(text: str) -> str:
    """`text` as Markdown that shows just these characters: no markup, and no number or name that becomes a link."""
    shown = re.sub(r"([\\`*_{}\[\]<>|~&])", r"\\\1", printable(text))
    return re.sub(r"([#@](?=\w)|:(?=//)|www(?=\.))", r"\1<!-- -->", shown)


def _without_folders(text: str, report: Report) -> str:
    """`text` with the examined files named without their folders, and without the user's home."""
    places = [one.file for finding in report.findings for one in finding.places]
    for file in sorted({*files_of(report), *places, *filter(None, (report.lock, report.site))}, key=len, reverse=True):
        if name := os.path.basename(os.path.normpath(file)):
            text = text.replace(file, name)
    home = str(Path.home())
    for folder in dict.fromkeys((os.path.realpath(home), home)):
        if folder != os.sep:
            text = text.replace(folder, "~")
    return text
