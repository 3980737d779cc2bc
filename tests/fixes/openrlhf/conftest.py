"""Every child process is started once per test session, however many workers ask for what it found."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import openrlhf_runs

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Calls a function once per session with these arguments, and gives back its result, which is JSON."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # xdist gives each worker a folder of its own

    def call(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        asked = json.dumps([function.__name__, args, named], sort_keys=True, default=str)
        file = shared / f"openrlhf-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                file.write_text(json.dumps(function(*args, **named)))
        return json.loads(file.read_text())

    return call


@pytest.fixture(scope="session")
def runs(once: Callable[..., Any]) -> Callable[..., Results]:
    """Runs a table of configurations on one release in one child, and gives back the results by name."""

    def run(
        version: str, table: Mapping[str, Mapping[str, Any]], *, trainfix: bool = True, ranks: int = 1, **env: str
    ) -> Results:
        found = once(on_release, version, list(table.values()), trainfix=trainfix, ranks=ranks, env=env)
        return dict(zip(table, found, strict=True))

    return run


def on_release(version: str, configurations: list[Any], **options: Any) -> list[dict[str, Any]]:
    return openrlhf_runs.run(openrlhf_runs.stack(version), configurations, **options)


def on_folders(folders: list[Path], configurations: list[Any], **options: Any) -> list[dict[str, Any]]:
    return openrlhf_runs.run(folders, configurations, **options)
