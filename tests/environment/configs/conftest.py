"""Files of a run in an empty current folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainfix.environment.configs import load
from trainfix.environment.runconfig import RunConfig


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(here: Path) -> Callable[..., str]:
    """Writes a file, JSON unless the content is text, and gives its name back."""

    def write(name: str, content: object) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return name

    return write


@pytest.fixture
def run(write: Callable[..., str]) -> Callable[..., RunConfig]:
    """Writes one file and reads the one run that it describes."""

    def run(name: str, content: object) -> RunConfig:
        (found,) = load([write(name, content)])
        return found

    return run
