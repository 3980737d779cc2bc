"""The saved results, each with where its numbers are from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Result(NamedTuple):
    """One file. kind: counted, measured, or what else the file says. hardware: what it was measured on."""

    file: Path
    kind: str
    hardware: str
    content: Row

    @property
    def steps(self) -> dict[str, Row]:
        """A GPU script's steps; empty for what is of no such script."""
        return _steps(self.content)

    def rows(self, step: str | None = None) -> list[Row]:
        """Of a GPU script's step, or of all its steps."""
        return [row for name, saved in self.steps.items() if step in (None, name) for row in saved["rows"]]


def read(folder: Path) -> list[Result]:
    """All of a folder, sorted by name. Raises ValueError for a file that is no JSON object."""
    return list(_read(folder))


def _read(folder: Path) -> Iterator[Result]:
    for file in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{file}: {problem}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a JSON object is wanted")
        yield Result(file, str(content.get("kind", "measured")), _hardware(content), content)


def _steps(content: Row) -> dict[str, Row]:
    steps = content.get("steps")
    return steps if isinstance(steps, dict) else {}  # elsewhere it is a number of steps


def _hardware(content: Row) -> str:
    for step in _steps(content).values():
        about = step["about"]
        known = (about.get(key) for key in ("hardware", "driver", "torch"))
        return ", ".join(str(one) for one in known if one)
    environment = content.get("environment")
    if isinstance(environment, dict):
        return f"{environment.get('cpu')}, {environment.get('cores')} cores"
    return str(content.get("hardware", "not said"))
