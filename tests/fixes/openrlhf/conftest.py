"""Runs of OpenRLHF's trainer: every child process is started once per session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import openrlhf_runs

Results = dict[str, dict[str, Any]]


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
