"""Runs of transformers' Trainer: every child process is started once per session."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import trainer_runs
from tests.support.stacks import folder, stack

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(once: Callable[..., Any]) -> Callable[..., Results]:
    """Runs a table of configurations (see trainer_runs) on released packages in one child, and gives back the results
    by name. `altered`: file of transformers -> (old text, new text)."""

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
    folders = stack(**packages)
    with tempfile.TemporaryDirectory() as place:
        if altered is not None:
            folders.insert(0, _altered(packages["transformers"], altered, Path(place)))
        return trainer_runs.run(folders, configurations, **options)


def _altered(version: str, changes: Mapping[str, tuple[str, str]], place: Path) -> Path:
    """A folder with this release of transformers, some of whose files have another text; the others are links."""
    released = folder("transformers", version)
    (place / "transformers").mkdir()
    for file in (released / "transformers").iterdir():
        if file.name not in changes:
            (place / "transformers" / file.name).symlink_to(file)
    for file in released.glob("transformers-*.dist-info"):
        (place / file.name).symlink_to(file)
    for name, (old, new) in changes.items():
        text = (released / "transformers" / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        (place / "transformers" / name).write_text(text.replace(old, new), encoding="utf-8")
    return place
