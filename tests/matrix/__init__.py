"""Every release of DeepSpeed, really run: wrong before where it is affected, right after, identical elsewhere.

`make matrix` runs all of them and keeps the table docs/matrix.json; tests/matrix/test_matrix.py runs, for each fix, one
release of each distinct combination of the shapes that decide about it, and both ends of every band.
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

from tests.matrix.cases import CASES, TIERS, WINDOWS, Case
from tests.support import experiment
from tests.support.releases import RELEASES, release
from trainfix import advisories
from trainfix.advisories import Advisory
from trainfix.engine.decide import load_fix, targets_of
from trainfix.environment.installed import find, shapes_of

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "matrix.json"
PACKAGE = "deepspeed"
Row = dict[str, Any]

# A gradient that lacks a micro-batch, or has one too many, is far off; what 16 bits round away is not.
_WRONG, _SIXTEEN_BITS, _ROUNDED = 0.05, 2e-2, 1e-5
# A repaired window is exact.
_COEFFICIENT_TOLERANCE, _RELATIVE_TOLERANCE = 1e-3, 1e-6
_DROPPED = 0.5


def doctor(version: str) -> dict[str, str]:
    """Doctor's verdict per advisory on this release."""
    command = [sys.executable, "-m", "trainfix", "doctor", "--format", "json"]
    paths = os.pathsep.join([str(release(version)), str(ROOT / "src")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        raise RuntimeError(f"doctor failed on {version}: {done.stderr}")
    findings = json.loads(done.stdout)["findings"]
    return {finding["id"]: finding["verdict"] for finding in findings if finding["package"] == PACKAGE}


def run(version: str, cases: Sequence[Case] = CASES) -> Row:
    """The row of one release: verdicts, which cases were wrong before and after, and every complaint."""
    cases = [case for case in cases if RELEASES.index(case.since) <= RELEASES.index(version)]
    verdicts = doctor(version)
    runs = [_run(version, [case for case in cases if case.ranks == ranks]) for ranks in (1, 2)]
    pairs, tiers = runs[0][0] + runs[1][0], runs[0][1] + runs[1][1]
    return {
        "release": version,
        "affected": sorted(affected(version) & repaired()),
        "wrong_before": [case.name for case, old, _ in pairs if old["error"] is None and is_wrong(case, old)],
        "wrong_after": [case.name for case, _, new in pairs if new["error"] is None and is_wrong(case, new)],
        "identical": sum(same(old, new) for _, old, new in pairs),
        "configurations": len(cases),
        "tiers": len(tiers),
        "complaints": [
            *(text for case, old, new in pairs for text in complaints(verdicts, case, old, new)),
            *(f"{case.name}: other bits by {tier}" for case, tier, one, other in tiers if not same(one, other)),
        ],
        "date": date.today().isoformat(),
        "torch": _torch_version(),
        "python": platform.python_version(),
        "digest": digest(),
    }


def _run(version: str, cases: Sequence[Case]) -> tuple[list[tuple[Case, Row, Row]], list[tuple[Case, str, Row, Row]]]:
    """Each case without and with trainfix; and with trainfix, by torch and by each other tier. All of them have the
    same number of ranks."""
    if not cases:
        return [], []
    options: dict[str, Any] = {"ranks": cases[0].ranks, "program": "tests.fixes.deepspeed.scenarios", "timeout": 600}
    configurations = [{"windows": WINDOWS, **case.configuration} for case in cases]
    tiered = [(number, tier) for number, case in enumerate(cases) if case.tiers for tier in TIERS]
    again = [{**configurations[number], "tier": tier} for number, tier in tiered]
    before = experiment.run(release(version), configurations, trainfix=False, **options)
    after = experiment.run(release(version), [*configurations, *again], trainfix=True, **options)
    by_tier = zip(tiered, after[len(cases) :], strict=True)
    return (
        list(zip(cases, before, after[: len(cases)], strict=True)),
        [(cases[number], tier, after[number], result) for (number, tier), result in by_tier],
    )


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def is_wrong(case: Case, result: Row) -> bool:
    """Whether any window of a run shows what the case looks at."""
    return any(_shows(case.looks_at, window) for window in result["windows"])


def _shows(what: str, window: Row) -> bool:
    if what == "rounding":
        return bool(window["captured"]["relative_error"] > _ROUNDED)
    if what == "earlier":
        return any(abs(coefficient) > _DROPPED for coefficient in window["earlier"])
    return max(window["relative_error"], window.get("side", window)["relative_error"]) > _WRONG


def same(before: Row, after: Row) -> bool:
    """Whether two runs consumed the same bits in every window and ended with the same parameters."""
    if before["error"] is not None or after["error"] is not None:
        return False
    bits = [[window["sha256"] for window in result["windows"]] for result in (before, after)]
    return bits[0] == bits[1] and before["parameters"] == after["parameters"]


def complaints(verdicts: dict[str, str], case: Case, before: Row, after: Row) -> list[str]:
    """What is not as it must be in one case; an empty list if all is well."""
    failed = [f"{case.name}: {result['error']}" for result in (before, after) if result["error"] is not None]
    if failed:
        return failed
    reached = [id for id in case.reaches if verdicts[id] == "affected"]
    found = []
    if is_wrong(case, before) != bool(reached):
        found.append(f"{'right' if reached else 'wrong'} without trainfix, where doctor says {reached or 'unaffected'}")
    if not reached and not same(before, after):
        found.append("not bitwise the same with trainfix")
    if reached:
        found += [text for window in after["windows"] for text in _inexact(case, window)]
    return [f"{case.name}: {text}" for text in found]


def _inexact(case: Case, window: Row) -> list[str]:
    """What is not right in a repaired window."""
    if not case.exact:
        return [f"error {window['relative_error']:.2e}"] if window["relative_error"] > _SIXTEEN_BITS else []
    captured = window["captured"]
    coefficients = captured["coefficients"] or window["coefficients"]
    off = [one for one in coefficients if abs(one - 1) > _COEFFICIENT_TOLERANCE]
    off += [one for one in window["earlier"] if abs(one) > _DROPPED]
    found = [f"coefficients {coefficients}, earlier {window['earlier']}"] if off else []
    error = captured["relative_error"]
    return found + ([f"relative error {error:.2e}"] if error > _RELATIVE_TOLERANCE else [])


def fixes() -> dict[str, list[Advisory]]:
    """Every repair of the package, by name, with its advisories."""
    found: dict[str, list[Advisory]] = {}
    for advisory in advisories.load_all():
        if advisory.package == PACKAGE and advisory.fix and load_fix(advisory.fix).build is not None:
            found.setdefault(advisory.fix, []).append(advisory)
    return found


def repaired() -> frozenset[str]:
    """The advisories that something repairs."""
    return frozenset(advisory.id for of_fix in fixes().values() for advisory in of_fix)


def affected(version: str) -> frozenset[str]:
    """The advisories that list this release."""
    return frozenset(a.id for a in advisories.load_all() if a.package == PACKAGE and version in a.affected)


def representatives() -> dict[str, list[Case]]:
    """Release -> the cases to run on it. For each fix: one release per combination of the shapes that decide about it,
    among the affected ones, and both sides of every end of a band."""
    chosen: dict[str, set[str]] = {}
    for fix, of_fix in fixes().items():
        ids = {advisory.id for advisory in of_fix}
        for version in _representatives(fix, of_fix):
            chosen.setdefault(version, set()).update(ids)
    wanted = {version: [case for case in CASES if ids & set(case.reaches)] for version, ids in chosen.items()}
    return {version: wanted[version] for version in RELEASES if version in wanted}


def _representatives(fix: str, of_fix: list[Advisory]) -> set[str]:
    seen: dict[tuple[str | None, ...], str] = {}
    hit = {version: frozenset(one.id for one in of_fix if version in one.affected) for version in RELEASES}
    for version in RELEASES:
        if hit[version]:
            copy = find(PACKAGE, [str(release(version))])[0]
            seen.setdefault(tuple(shapes_of(copy, targets_of(load_fix(fix), of_fix)).values()), version)
    ends = {version for pair in pairwise(RELEASES) if hit[pair[0]] != hit[pair[1]] for version in pair}
    return {*seen.values(), *ends, *({RELEASES[0], RELEASES[-1]} if hit[RELEASES[0]] or hit[RELEASES[-1]] else ())}


def digest() -> str:
    """Of what a row comes from: grid, judgement, repair, experiment. A row with another digest is run again."""
    known = [one for one in advisories.load_all() if one.package == PACKAGE and one.fix]
    catalogue = [(one.id, one.affected, sorted(map(repr, one.evidence.items()))) for one in known]
    source = ROOT / "src" / "trainfix"
    files = [path for room in ("fixes/deepspeed", "gradcopy") for path in sorted((source / room).rglob("*.py"))]
    files.append(source / "measure" / "coefficients.py")
    files += [ROOT / "tests" / "support" / name for name in ("experiment.py", "layouts.py")]
    inputs = [repr((CASES, catalogue)).encode(), *(path.read_bytes() for path in files)]
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
