"""Runs of DeepSpeed: every child process is started once per session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.fixes.deepspeed import tables
from tests.support import experiment
from tests.support.releases import release

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(once: Callable[..., Any]) -> Callable[..., Results]:
    """Runs a table of configurations on one release in one child, and gives back the results by name."""

    def run(version: str, table: Mapping[str, Mapping[str, Any]], *, trainfix: bool, **options: Any) -> Results:
        options |= {"trainfix": trainfix, "program": "tests.fixes.deepspeed.scenarios"}
        found = once(experiment.run, release(version), list(table.values()), **options)
        return dict(zip(table, found, strict=True))

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
