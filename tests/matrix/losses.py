"""The repairs of losses, really run on every band of releases: wrong before, right after, and the rest left alone.

`make matrix` runs them all and keeps the table docs/losses.json. What a band is, is data: tests/matrix/bands.py.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import Version

from tests.matrix import ROOT, Row, _torch_version
from tests.matrix.bands import BANDS, PROGRAMS, RUN_ELSEWHERE, Band, Case
from tests.support import stacks, trainer_runs
from trainfix import advisories
from trainfix.engine.decide import load_fix

TABLE = ROOT / "docs" / "losses.json"

# A gradient whose tokens count differently is far off, and so is the logged loss; what float32 rounds away is not.
_WRONG, _WRONG_LOG = 1e-3, 1e-3
# A repaired window is exact.
_WEIGHT_TOLERANCE, _RELATIVE_TOLERANCE = 1e-3, 1e-4

_SHARED = ("proofs/token_experiment.py", "measure/token_weights.py", "measure/coefficients.py")
_HARNESS = ("trainer_runs.py", "stacks.py", "layouts.py", "experiment.py", "prepared.py")


def key(band: Band, release: str, beside: Mapping[str, str]) -> str:
    """What a row is known by: the packages that were run."""
    return _name({band.package: release, **beside})


def _name(packages: Mapping[str, str]) -> str:
    return " + ".join(f"{name} {version}" for name, version in packages.items())


def rows_wanted() -> dict[str, tuple[Band, str, Mapping[str, str]]]:
    """Every row that the table must have."""
    return {key(band, release, beside): (band, release, beside) for band in BANDS for release, beside in band.runs}


def folders(band: Band, release: str, beside: Mapping[str, str]) -> list[Path]:
    """The packages of a row, installed."""
    program = importlib.import_module(PROGRAMS[band.package])
    stack = getattr(program, "stack", stacks.stack)
    found: list[Path] = stack(**{band.package: release, **beside})
    return found


def doctor(places: Sequence[Path]) -> dict[str, str]:
    """Doctor's verdict per advisory on these packages."""
    env = stacks.environment(*places, trainfix=True)
    command = [sys.executable, "-m", "trainfix", "doctor", "--format", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        raise RuntimeError(f"doctor failed on {', '.join(place.name for place in places)}: {done.stderr}")
    return {finding["id"]: finding["verdict"] for finding in json.loads(done.stdout)["findings"]}


def cases_of(band: Band, release: str) -> list[Case]:
    """The configurations that are run on a release of the band. What DeepSpeed leaves in a process, accelerate sees:
    its own come last."""
    held = [case for case in band.cases if Version(case.since) <= Version(release) <= Version(case.until)]
    cases = [case for case in held if release not in case.cannot]
    return sorted(cases, key=lambda case: "deepspeed" in case.configuration)


def run(band: Band, release: str, beside: Mapping[str, str]) -> Row:
    """One row: verdicts, which configurations were wrong before and after, and every complaint."""
    places, cases = folders(band, release, beside), cases_of(band, release)
    verdicts = doctor(places)
    pairs = [pair for ranks in (1, 2) for pair in _run(band, places, [case for case in cases if case.ranks == ranks])]
    return {
        "package": band.package,
        "release": release,
        "beside": dict(beside),
        "band": [band.first, band.last],
        "affected": sorted({id for case in cases for id in case.reaches if verdicts.get(id) == "affected"}),
        "configurations": len(cases),
        "wrong_before": [case.name for case, old, _ in pairs if old["error"] is None and is_wrong(old)],
        "wrong_after": [case.name for case, _, new in pairs if new["error"] is None and is_wrong(new)],
        "identical": sum(same(old, new) for _, old, new in pairs),
        "complaints": [text for case, old, new in pairs for text in complaints(verdicts, case, old, new)],
        "date": date.today().isoformat(),
        "torch": _torch_version(),
        "python": platform.python_version(),
        "digest": digest(band, release),
    }


def _run(band: Band, places: Sequence[Path], cases: Sequence[Case]) -> list[tuple[Case, Row, Row]]:
    """Each case without and with trainfix. All of them have the same number of ranks."""
    if not cases:
        return []
    options: dict[str, Any] = {"ranks": cases[0].ranks, "program": PROGRAMS[band.package], "timeout": 600}
    configurations = [case.configuration for case in cases]
    before = trainer_runs.run(places, configurations, trainfix=False, **options)
    after = trainer_runs.run(places, configurations, trainfix=True, **options)
    return list(zip(cases, before, after, strict=True))


def is_wrong(result: Row) -> bool:
    """Whether tokens count differently in any window, or a loss that a person sees is not the window's."""
    return any(window["relative_error"] > _WRONG for window in result["windows"]) or bool(_wrong_logs(result))


def _wrong_logs(result: Row) -> list[tuple[float, float]]:
    """(logged, exact) loss of the windows whose log is off."""
    logged = [one["loss"] for one in result.get("logs", ()) if "loss" in one]
    exact = [window["exact_loss"] for window in result["windows"]]
    return [(a, b) for a, b in zip(logged, exact, strict=False) if abs(a - b) > _WRONG_LOG * abs(b)]


def same(before: Row, after: Row) -> bool:
    """Whether all windows of two runs consumed the same bits, and their logs say the same."""
    if before["error"] is not None or after["error"] is not None:
        return False
    seen = [json.dumps([result["windows"], result.get("logs")]) for result in (before, after)]
    return seen[0] == seen[1]


def complaints(verdicts: Mapping[str, str], case: Case, before: Row, after: Row) -> list[str]:
    """What is not as it must be in one configuration; an empty list if all is well."""
    stopped = [id for id in case.reaches if verdicts.get(id) == "affected" and id in stopping()]
    if stopped and before["error"] is None and is_wrong(before):
        said = str(after["error"])
        return [] if f"UnfixedBugError: {stopped[0]} is reached" in said else [f"{case.name}: not stopped: {said}"]
    failed = [f"{case.name}: {result['error']}" for result in (before, after) if result["error"] is not None]
    failed += [f"{case.name}: no window" for result in (before, after) if not result["windows"] and not failed]
    if failed:
        return failed
    reached = [id for id in case.reaches if verdicts.get(id) == "affected"]
    found = []
    if is_wrong(before) != bool(reached):
        found.append(f"{'right' if reached else 'wrong'} without trainfix, where doctor says {reached or 'unaffected'}")
    if not reached and not same(before, after):
        found.append("not bitwise the same with trainfix")
    if reached:
        found += [text for window in after["windows"] for text in _inexact(window)]
        found += [f"logs {logged}, is {exact:.4f}" for logged, exact in _wrong_logs(after)]
    return [f"{case.name}: {text}" for text in found]


def _inexact(window: Row) -> list[str]:
    """What is not right in a repaired window."""
    off = [one for one in window["weights"] if one == one and abs(one * window["scale"] - 1) > _WEIGHT_TOLERANCE]
    found = [f"weights {window['weights']}, scale {window['scale']}"] if off else []
    error = window["relative_error"]
    return found + ([f"relative error {error:.2e}"] if error > _RELATIVE_TOLERANCE else [])


def repaired() -> list[advisories.Advisory]:
    """The advisories of losses that a repair exists for, and that the bands' programs can reach."""
    known = [one for one in advisories.load_all() if one.package in PROGRAMS and one.id not in RUN_ELSEWHERE]
    return [one for one in known if (fix := one.repaired_by.fix) is not None and load_fix(fix).build is not None]


@cache
def stopping() -> frozenset[str]:
    """The advisories that nothing repairs: a run that reaches one is stopped."""
    known = [one for one in advisories.load_all() if one.package in PROGRAMS and one.fix is not None]
    return frozenset(one.id for one in known if load_fix(str(one.fix)).build is None)


def not_covered() -> list[str]:
    """``TF-0401 on 4.45.2`` for each affected release that is in no band which reaches the error."""
    return [
        f"{advisory.id} on {release}"
        for advisory in repaired()
        for release in advisory.affected
        if not any(
            band.package == advisory.package and band.holds(release) and _reaches(band, advisory.id) for band in BANDS
        )
    ]


def _reaches(band: Band, id: str) -> bool:
    return any(id in case.reaches for release, _ in band.runs for case in cases_of(band, release))


def digest(band: Band, release: str) -> str:
    """Of what a row comes from: configurations, repair, experiment. A row with another digest is run again."""
    known = [one for one in advisories.load_all() if one.package in PROGRAMS]
    catalogue = [(one.id, one.affected, sorted(map(repr, one.evidence.items())), dict(one.needs)) for one in known]
    source, support = ROOT / "src" / "trainfix", ROOT / "tests" / "support"
    rooms = [source / "fixes" / room for room in sorted({"accelerate", "transformers", band.package})]
    files = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    files += [*sorted((source / "fixes").glob("*.py")), *(source / name for name in _SHARED)]
    files += [support / name for name in _HARNESS]
    files.append(ROOT / f"{PROGRAMS[band.package].replace('.', '/')}.py")
    inputs = [repr((cases_of(band, release), catalogue)).encode(), *(path.read_bytes() for path in files)]
    return hashlib.sha256(b"".join(inputs)).hexdigest()[:12]


def load() -> dict[str, Row]:
    """The committed table, by the packages that were run."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {_name({row["package"]: row["release"], **row["beside"]}): row for row in rows}


def save(rows: Mapping[str, Row]) -> None:
    """Write the table in the order of the bands, rows that no band asks for left out; whole or not at all."""
    unfinished = TABLE.with_suffix(".tmp")
    unfinished.write_text(json.dumps([rows[one] for one in rows_wanted() if one in rows], indent=1) + "\n")
    unfinished.replace(TABLE)


def stale(rows: Mapping[str, Row]) -> list[str]:
    """The rows that are missing or out of date."""
    wanted = rows_wanted().items()
    return [name for name, (band, release, _) in wanted if rows.get(name, {}).get("digest") != digest(band, release)]
