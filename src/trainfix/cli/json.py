"""Reports as JSON. Keys are only ever added."""

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
    return _dump(
        {
            "schema": SCHEMA,
            "trainfix": __version__,
            "catalogue": report.catalogue,
            "python": report.python,
            "packages": dict(report.packages),
            "active": report.active,
            "configs": list(report.configs),
            "exit": report.exit_code,
            "remarks": list(report.remarks),
            "findings": [_finding(finding) for finding in report.findings],
            "hazards": [_hazard(one, config, report.packages[one.package]) for one, config in report.hazards],
        }
    )


def _finding(finding: Finding) -> dict[str, Any]:
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


def _dump(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def prove_json(proofs: Sequence[Mapping[str, Any]], code: int) -> str:
    """The proofs as one JSON object."""
    packages = {proof["package"]: proof["installed"] for proof in proofs if proof["installed"] is not None}
    return _dump(
        {"schema": SCHEMA, "trainfix": __version__, "packages": packages, "exit": code, "proofs": list(proofs)}
    )
