"""Every release of DeepSpeed, really run: wrong before where it is affected, right after, untouched or identical
elsewhere.

`make matrix` runs all of them and keeps the table docs/matrix.json; tests/matrix/test_matrix.py runs one release for
each distinct combination of the shapes that decide, and both ends of every band.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.support import experiment
from tests.support.releases import RELEASES, release
from trainfix import advisories
from trainfix.engine.decide import load_fix, targets_of
from trainfix.environment.installed import find, shapes_of

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "matrix.json"
PACKAGE = "deepspeed"
Row = dict[str, Any]

# Coefficients of dropped micro-batches are 0; those of bf16 sums stray from 1 by a few thousandths (severity
# precision).
_DROPPED = 0.5
# A repaired window is exact.
_COEFFICIENT_TOLERANCE, _RELATIVE_TOLERANCE = 1e-3, 1e-6

GRID: tuple[dict[str, Any], ...] = tuple(
    {"stage": stage, "dtype": dtype, "ga": ga, "driver": driver, "windows": 2}
    for driver, accumulation in (("every", (1, 2, 3, 8)), ("accelerate", (4,)))
    for stage in (1, 2)
    for dtype in ("bf16", "fp32")
    for ga in accumulation
)


def name(configuration: dict[str, Any]) -> str:
    """A configuration as one word of the table: ``Z2 bf16 GA8``, or ``Z2 fp32 4 backwards``."""
    steps = f"GA{configuration['ga']}" if configuration["driver"] == "every" else f"{configuration['ga']} backwards"
    return f"Z{configuration['stage']} {configuration['dtype']} {steps}"


def reaches(advisory_id: str, configuration: dict[str, Any]) -> bool:
    """Whether the configuration reaches the error on an affected release."""
    if configuration["stage"] != 2:
        return False
    by_hand = configuration["driver"] == "accelerate"
    return by_hand if advisory_id == "TF-0003" else not by_hand and configuration["ga"] > 2


def doctor(version: str) -> dict[str, str]:
    """Doctor's verdict per advisory on this release."""
    command = [sys.executable, "-m", "trainfix", "doctor", "--format", "json"]
    paths = os.pathsep.join([str(release(version)), str(ROOT / "src")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        raise RuntimeError(f"doctor failed on {version}: {done.stderr}")
    return {finding["id"]: finding["verdict"] for finding in json.loads(done.stdout)["findings"]}


def run(version: str) -> Row:
    """The row of one release: verdicts, which configurations were wrong before and after, and every complaint."""
    folder = release(version)
    before = experiment.run(folder, GRID, trainfix=False)
    after = experiment.run(folder, GRID, trainfix=True)
    verdicts = doctor(version)
    rows = list(zip(GRID, before, after, strict=True))
    return {
        "release": version,
        "verdicts": verdicts,
        "states": {record["id"]: record["state"] for record in after[0].get("status", [])},
        "wrong_before": [name(grid) for grid, result, _ in rows if result["error"] is None and loses(result)],
        "wrong_after": [name(grid) for grid, _, result in rows if result["error"] is None and loses(result)],
        "identical": sum(same(old, new) for _, old, new in rows),
        "configurations": len(GRID),
        "complaints": [text for grid, old, new in rows for text in complaints(verdicts, grid, old, new)],
        "date": date.today().isoformat(),
        "torch": _torch_version(),
        "python": platform.python_version(),
        "digest": digest(),
    }


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def loses(result: Row) -> bool:
    """Whether any window of a run dropped a micro-batch or saw one of an earlier window."""
    return any(
        any(abs(coefficient - 1) > _DROPPED for coefficient in window["coefficients"])
        or any(abs(coefficient) > _DROPPED for coefficient in window["earlier"])
        for window in result["windows"]
    )


def same(before: Row, after: Row) -> bool:
    """Whether two runs consumed the same bits in every window and ended with the same parameters."""
    bits = [[window["sha256"] for window in result["windows"]] for result in (before, after)]
    return before["error"] is None and bits[0] == bits[1] and before["parameters"] == after["parameters"]


def complaints(verdicts: dict[str, str], configuration: dict[str, Any], before: Row, after: Row) -> list[str]:
    """What is not as it must be in one configuration; an empty list if all is well."""
    label = name(configuration)
    failed = [f"{label}: {result['error']}" for result in (before, after) if result["error"] is not None]
    if failed:
        return failed
    affected = [id for id, verdict in verdicts.items() if verdict == "affected" and reaches(id, configuration)]
    found = []
    if loses(before) != bool(affected):
        found.append(f"{label}: {'right' if affected else 'wrong'} without trainfix, doctor says {verdicts}")
    if not affected and not same(before, after):
        found.append(f"{label}: not bitwise the same with trainfix")
    if affected:
        found += [f"{label}: {text}" for window in after["windows"] for text in _inexact(window)]
    return found


def _inexact(window: Row) -> list[str]:
    captured = window["captured"]
    off = [c for c in captured["coefficients"] if abs(c - 1) > _COEFFICIENT_TOLERANCE]
    off += [c for c in window["earlier"] if abs(c) > _DROPPED]
    error = captured["relative_error"]
    found = [f"coefficients {captured['coefficients']}, earlier {window['earlier']}"] if off else []
    return found + ([f"relative error {error:.2e}"] if error > _RELATIVE_TOLERANCE else [])


def shapes(version: str) -> tuple[str | None, ...]:
    """The shapes that decide about this release, in a fixed order."""
    catalogue = [advisory for advisory in advisories.load_all() if advisory.package == PACKAGE]
    copy = find(PACKAGE, [str(release(version))])[0]
    found: list[str | None] = []
    for fix in sorted({advisory.fix for advisory in catalogue if advisory.fix}):
        of_fix = [advisory for advisory in catalogue if advisory.fix == fix]
        found += shapes_of(copy, targets_of(load_fix(fix), of_fix)).values()
    return tuple(found)


def affected(version: str) -> frozenset[str]:
    """The advisories that list this release."""
    return frozenset(a.id for a in advisories.load_all() if a.package == PACKAGE and version in a.affected)


def representatives() -> list[str]:
    """One release per combination of shapes among the affected ones, and both sides of every end of a band."""
    chosen: dict[object, str] = {}
    for version in RELEASES:
        if affected(version):
            chosen.setdefault(shapes(version), version)
    for older, newer in pairwise(RELEASES):
        if affected(older) != affected(newer):
            chosen |= {older: older, newer: newer}
    ends = {RELEASES[0], RELEASES[-1], *chosen.values()}
    return [version for version in RELEASES if version in ends]


def digest() -> str:
    """Of what a row comes from: grid, judgement, repair, experiment. A row with another digest is run again."""
    catalogue = [(one.id, one.affected, sorted(map(repr, one.evidence.items()))) for one in advisories.load_all()]
    rooms = [ROOT / "src" / "trainfix" / room for room in ("fixes", "gradcopy", "measure")]
    files = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    files.append(ROOT / "tests" / "support" / "experiment.py")
    inputs = [repr((GRID, catalogue)).encode(), *(path.read_bytes() for path in files)]
    return hashlib.sha256(b"".join(inputs)).hexdigest()[:12]


def load() -> dict[str, Row]:
    """The committed table: release -> row."""
    return {row["release"]: row for row in json.loads(TABLE.read_text())} if TABLE.exists() else {}


def save(rows: dict[str, Row]) -> None:
    """Write the table, oldest release first; whole or not at all."""
    ordered: Sequence[Row] = [rows[version] for version in RELEASES if version in rows]
    unfinished = TABLE.with_suffix(".tmp")
    unfinished.write_text(json.dumps(ordered, indent=1) + "\n")
    unfinished.replace(TABLE)
