"""Every child process is started once per test session, however many workers ask for what it found."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import experiment
from tests.support.releases import release

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Runs a table of configurations on one release in one child, and gives back the results by name."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # xdist gives each worker a folder of its own

    def run(version: str, table: Mapping[str, Mapping[str, Any]], *, trainfix: bool, ranks: int = 1, **more: Any) -> Results:
        asked = json.dumps([version, table, trainfix, ranks, more], sort_keys=True)
        file = shared / f"deepspeed-{version}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                found = _run(version, table, trainfix=trainfix, ranks=ranks, **more)
                file.write_text(json.dumps(found))
        results: Results = json.loads(file.read_text())
        return results

    return run


def _run(version: str, table: Mapping[str, Mapping[str, Any]], **options: Any) -> Results:
    folder: Path = release(version)
    program = "tests.fixes.deepspeed.scenarios"
    found = experiment.run(folder, list(table.values()), program=program, **options)
    return dict(zip(table, found, strict=True))
