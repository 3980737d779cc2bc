"""The report of doctor as SARIF 2.1.0, for code scanning.

A result for every finding that needs attention, and for every one that the user ignores, which is suppressed. What is
fine has its rule alone: services show any result as an alert, whatever its kind.
"""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from trainfix import __version__
from trainfix.cli.json import dump
from trainfix.cli.markdown import plain
from trainfix.cli.text import files_of, installed_as, installed_of, proof_of, reasons_of, remarks_of, ways_out
from trainfix.environment.printable import printable

if TYPE_CHECKING:
    from trainfix.advisories import Advisory
    from trainfix.cli.examine import Finding, Report

HOME = "https://github.com/trainfix/trainfix"
SPECIFICATION = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LONGEST = 1000  # characters of a description: code scanning takes 1024
_PRECISION = {"proved": "very-high", "read": "high", "reported": "medium"}
_KINDS = {"yes": "fail", "unknown": "review", "no": "notApplicable"}


def doctor_sarif(report: Report) -> str:
    """The report of doctor as one SARIF log."""
    rules = {finding.advisory.id: number for number, finding in enumerate(report.findings)}
    shown = [finding for finding in report.findings if not finding.settled or finding.ignored is not None]
    driver = {
        "name": "trainfix",
        "version": __version__,
        "informationUri": HOME,
        "rules": [_rule(finding) for finding in report.findings],
        "properties": {"catalogue": report.catalogue},
    }
    invocation = {
        "executionSuccessful": True,
        "exitCode": report.exit_code,
        "toolExecutionNotifications": [
            {"level": "note", "message": {"text": _message(remark)}} for remark in remarks_of(report)
        ],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "results": [_result(finding, rules[finding.advisory.id], report) for finding in shown],
        "properties": {"packages": dict(report.packages), "installed": printable(installed_of(report))},
    }
    return dump({"$schema": SPECIFICATION, "version": "2.1.0", "runs": [run]})


def _rule(finding: Finding) -> dict[str, Any]:
    advisory = finding.advisory
    return {
        "id": advisory.id,
        "shortDescription": {"text": advisory.summary},
        "fullDescription": {"text": textwrap.shorten(advisory.details, _LONGEST, placeholder=" ...")},
        "helpUri": advisory.url,
        "help": {"text": _help(advisory), "markdown": _help_in_markdown(advisory)},
        # What a result without a level has where a reader takes no account of its kind.
        "defaultConfiguration": {"level": _level(finding)},
        "properties": {
            "tags": ["correctness", advisory.package, advisory.severity],
            "precision": _PRECISION[advisory.evidence_level],
        },
    }


def _help(advisory: Advisory) -> str:
    return "\n\n".join([*filter(None, advisory.details.split("\n")), *(f"{way}." for way in _ways(advisory))])


def _help_in_markdown(advisory: Advisory) -> str:
    paragraphs = [plain(line) for line in advisory.details.split("\n") if line]
    ways = "\n".join(f"- {plain(way)}" for way in _ways(advisory))
    return "\n\n".join([*paragraphs, ways, f"[{advisory.id}]({advisory.url})"])


def _ways(advisory: Advisory) -> Iterator[str]:
    """What can be done about it anywhere."""
    fixed, config = advisory.fixed_in, advisory.ways_out["config"]
    if advisory.repaired_by.fix is not None:
        yield "Repair: import trainfix in the training script"
    yield f"Upgrade: fixed in {advisory.package} {fixed}" if fixed else f"Upgrade: no release of {advisory.package} yet"
    if config:
        yield f"Config: {config}"


def _level(finding: Finding) -> str:
    """error where it is grave and reached, warning where one of the two is open, note for the rest."""
    if finding.advisory.severity in ("metric", "default"):
        return "note"
    return "error" if finding.grave and finding.reachable == "yes" else "warning"


def _kind(finding: Finding) -> str:
    if finding.repaired:
        return "pass"
    return "review" if finding.verdict in ("unknown", "unverified") else _KINDS[finding.reachable]


def _result(finding: Finding, rule: int, report: Report) -> dict[str, Any]:
    kind, places = _kind(finding), _places(finding, report)
    result: dict[str, Any] = {
        "ruleId": finding.advisory.id,
        "ruleIndex": rule,
        "kind": kind,
        "message": {"text": _message(_said(finding, report))},
        "locations": [_location(*place) for place in places],
        "partialFingerprints": {"trainfixFinding/v1": _fingerprint(finding, places)},
        "properties": {
            "verdict": finding.verdict,
            "reachable": finding.reachable,
            "severity": finding.advisory.severity,
            "evidence": finding.advisory.evidence_level,
        },
    }
    if kind == "fail":  # SARIF gives a level to no other kind
        result["level"] = _level(finding)
    if finding.ignored is not None:
        justification = _message(finding.ignored)
        result["suppressions"] = [{"kind": "external", "status": "accepted", "justification": justification}]
    return result


def _said(finding: Finding, report: Report) -> str:
    """The finding in a few sentences."""
    reached = {"yes": "Reached", "no": "Not reached", "unknown": "Perhaps reached"}[finding.reachable]
    proof = proof_of(finding, report)
    sentences = [
        finding.advisory.summary,
        installed_as(finding),
        f"{reached}: {'; '.join(reasons_of(finding))}",
        f"Proved here: {proof}" if proof else "",
        *(f"{label.capitalize()}: {text}" for label, text in ways_out(finding, proved=bool(proof)) if text),
        *(f"Note: {note}" for note in finding.notes),
    ]
    return ". ".join(filter(None, sentences)) + "."


def _places(finding: Finding, report: Report) -> list[tuple[str, str, int | None]]:
    """(file, key, line) of the settings that decide; else the configs, or the lock file, as a whole; else nothing."""
    places = [(one.file, one.key, one.line) for one in finding.places]
    files = files_of(report) or ([report.lock] if report.lock else [])
    return list(dict.fromkeys(places or [(file, "", None) for file in files]))


def _location(file: str, key: str, line: int | None) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri(file)}}
    if line is not None:
        physical["region"] = {"startLine": line}
    location: dict[str, Any] = {"physicalLocation": physical}
    if key:
        location["logicalLocations"] = [{"fullyQualifiedName": printable(key), "kind": "property"}]
    return location


def uri(file: str) -> str:
    """`file` as a URI: relative to the current folder where it lies below it, with forward slashes."""
    path = Path(file)
    if not path.is_absolute():
        return quote(os.fsencode(path.as_posix()))
    try:
        return quote(os.fsencode(path.relative_to(Path.cwd()).as_posix()))
    except ValueError:
        return path.as_uri()


def _fingerprint(finding: Finding, places: list[tuple[str, str, int | None]]) -> str:
    """The same for as long as the same settings of the same files reach the same error, on whatever line."""
    said = [finding.advisory.id, *(f"{uri(file)}#{key}" for file, key, _ in places)]
    return hashlib.sha256("\n".join(dict.fromkeys(said)).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _message(text: str) -> str:
    """`text` as a SARIF message: no character that steers, no placeholder, no link of somebody else's making."""
    return printable(text).replace("](", "] (").replace("{", "{{").replace("}", "}}")
