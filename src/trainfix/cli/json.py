"""Reports as JSON. Keys are only ever added; the schemas in ``trainfix/schemas`` list them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainfix import __version__
from trainfix.advisories.reach import condition

if TYPE_CHECKING:
    from trainfix.advisories.hazards import Hazard
    from trainfix.cli.examine import Finding, Report

SCHEMA = 1


def doctor_json(report: Report) -> str:
    """The report of doctor as one JSON object."""
    return dump(
        {
            "schema": SCHEMA,
            "trainfix": __version__,
            "catalogue": report.catalogue,
            "python": report.python,
            "packages": dict(report.packages),
            "active": report.active,
            "configs": list(report.configs),
            "lock": report.lock,
            "site": report.site,
            "exit": report.exit_code,
            "remarks": list(report.remarks),
            "findings": [_finding(finding, report.proofs.get(finding.advisory.id)) for finding in report.findings],
            "hazards": [_hazard(one, config, report.packages[one.package]) for one, config in report.hazards],
        }
    )


def _finding(finding: Finding, proof: Mapping[str, Any] | None) -> dict[str, Any]:
    advisory = finding.advisory
    return {
        "id": advisory.id,
        "package": advisory.package,
        "installed": finding.installed,
        "verdict": finding.verdict,
        "by": finding.by,
        "shape": finding.shape,
        "reachable": finding.reachable,
        "because": list(finding.because),
        "repair": finding.repair,
        "repaired": finding.repaired,
        "repaired_by": finding.repaired_by,
        "severity": advisory.severity,
        "evidence": advisory.evidence_level,
        "summary": advisory.summary,
        "fixed_in": advisory.fixed_in,
        "blocked_by": [asdict(blocker) for blocker in finding.blocked_by],
        "hazards": [hazard.change for hazard in finding.hazards],
        "url": advisory.url,
        "notes": list(finding.notes),
        "ignored": finding.ignored,
        "places": [{"file": one.file, "key": one.key, "line": one.line} for one in finding.places],
        "proof": None if proof is None else dict(proof),
    }


def _hazard(hazard: Hazard, config: str, installed: str) -> dict[str, Any]:
    return {
        "package": hazard.package,
        "key": hazard.key,
        "value": hazard.after,
        "before": hazard.before,
        "since": hazard.release,
        "config": config,
        "only_if": [condition(trigger) for trigger in hazard.triggers],
        "affects": hazard.affects,
        "summary": hazard.in_force(installed, config),
        "url": hazard.url,
    }


def dump(report: dict[str, Any]) -> str:
    """The JSON text of a report, with every character escaped that a terminal would not simply show."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        text = "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)
    return text + "\n"


def prove_json(proofs: Sequence[Mapping[str, Any]], code: int) -> str:
    """The proofs as one JSON object."""
    packages = {proof["package"]: proof["installed"] for proof in proofs if proof["installed"] is not None}
    return dump({"schema": SCHEMA, "trainfix": __version__, "packages": packages, "exit": code, "proofs": list(proofs)})
