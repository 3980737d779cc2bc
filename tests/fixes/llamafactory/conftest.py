"""Runs of LLaMA-Factory's trainers: every child process is started once per session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import llamafactory_runs, stacks

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(once: Callable[..., Any]) -> Callable[..., Results]:
    """Runs a table of configurations (see llamafactory_runs) in one child, and gives back the results by name.

    `packages`: a LLaMA-Factory release, and what is to differ from what it is run with. `altered`: file of its ->
    (old text, new text).
    """

    def run(packages: Mapping[str, str], table: Mapping[str, Mapping[str, Any]], **options: Any) -> Results:
        return dict(zip(table, once(on_stack, packages, list(table.values()), **options), strict=True))

    return run


def on_stack(
    packages: Mapping[str, str],
    configurations: list[Any],
    *,
    altered: Mapping[str, tuple[str, str]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    folders = llamafactory_runs.stack(**packages)
    with tempfile.TemporaryDirectory() as place:
        if altered is not None:
            folders.insert(0, _altered(packages["llamafactory"], altered, Path(place, "altered")))
        return llamafactory_runs.run(folders, configurations, **options)


def _altered(version: str, changes: Mapping[str, tuple[str, str]], place: Path) -> Path:
    """A folder with this release of LLaMA-Factory, some of whose files have another text."""
    shutil.copytree(stacks.folder("llamafactory", version), place)
    for name, (old, new) in changes.items():
        file = place / "llamafactory" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        file.write_text(text.replace(old, new), encoding="utf-8")
    return place
