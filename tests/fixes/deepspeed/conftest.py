"""Every child process is started once per test session, however many workers ask for what it found."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.fixes.deepspeed import tables
from tests.support import experiment
from tests.support.releases import release

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Runs a table of configurations on one release in one child, and gives back the results by name."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # xdist gives each worker a folder of its own

    def run(version: str, table: Mapping[str, Mapping[str, Any]], *, trainfix: bool, **options: Any) -> Results:
        asked = json.dumps([version, table, trainfix, options], sort_keys=True)
        file = shared / f"deepspeed-{version}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                program = "tests.fixes.deepspeed.scenarios"
                configurations = list(table.values())
                found = experiment.run(release(version), configurations, trainfix=trainfix, program=program, **options)
                file.write_text(json.dumps(dict(zip(table, found, strict=True))))
        results: Results = json.loads(file.read_text())
        return results

    return run


@pytest.fixture(scope="session")
def unpatched(runs: Callable[..., Results]) -> Results:
    """DeepSpeed 0.18.9 on one rank."""
    return runs("0.18.9", tables.ONE_RANK, trainfix=False)


@pytest.fixture(scope="session")
def repaired(runs: Callable[..., Results]) -> Results:
    """DeepSpeed 0.18.9 on one rank, `import trainfix` first."""
    return runs("0.18.9", tables.ONE_RANK_WITH_TRAINFIX, trainfix=True)


@pytest.fixture(scope="session")
def unpatched_ranks(runs: Callable[..., Results]) -> Results:
    """DeepSpeed 0.18.9 on two ranks."""
    return runs("0.18.9", tables.BOTH_RANKS, trainfix=False, ranks=2)


@pytest.fixture(scope="session")
def repaired_ranks(runs: Callable[..., Results]) -> Results:
    """DeepSpeed 0.18.9 on two ranks, `import trainfix` first."""
    return runs("0.18.9", tables.BOTH_RANKS, trainfix=True, ranks=2)
