"""What the tests of all losses share: each child process is started once per session, whichever worker asks first."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Calls a function once per session with these arguments, and gives back its result, which is JSON."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # xdist gives each worker a folder of its own

    def call(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        name = f"{function.__module__}.{function.__qualname__}"
        asked = json.dumps([name, args, named], sort_keys=True, default=str)
        file = shared / f"once-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                file.write_text(json.dumps(function(*args, **named)))
        return json.loads(file.read_text())

    return call
