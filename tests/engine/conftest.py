"""What the tests of the engine share."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from typing import Any

import pytest

Once = Callable[[str, Callable[[], Any]], Any]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Calls `make` once per test session, however many workers ask for what it gives (as JSON) under this name."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # xdist gives each worker a folder of its own

    def ask(name: str, make: Callable[[], Any]) -> Any:
        file = shared / f"engine-{name}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                file.write_text(json.dumps(make()))
        return json.loads(file.read_text())

    return ask
