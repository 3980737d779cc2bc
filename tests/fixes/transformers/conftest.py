"""Every child process is started once per test session, however many workers ask for what it found."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import trainer_runs
from tests.support.stacks import folder, stack

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Runs a table of configurations (see trainer_runs) on released packages in one child, and gives back the results
    by name. `altered`: file of transformers -> (old text, new text)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # xdist gives each worker a folder of its own

    def run(
        packages: Mapping[str, str],
        table: Mapping[str, Mapping[str, Any]],
        *,
        trainfix: bool,
        altered: Mapping[str, tuple[str, str]] | None = None,
        **options: Any,
    ) -> Results:
        asked = json.dumps([packages, table, trainfix, altered, options], sort_keys=True)
        name = hashlib.sha256(asked.encode()).hexdigest()[:16]
        file = shared / f"transformers-{packages['transformers']}-{name}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                folders = stack(**packages)
                if altered is not None:
                    folders.insert(0, _altered(packages["transformers"], altered, shared / f"altered-{name}"))
                found = trainer_runs.run(folders, list(table.values()), trainfix=trainfix, **options)
                file.write_text(json.dumps(dict(zip(table, found, strict=True))))
        results: Results = json.loads(file.read_text())
        return results

    return run


def _altered(version: str, changes: Mapping[str, tuple[str, str]], place: Path) -> Path:
    """A folder with this release of transformers, some of whose files have another text; the others are links."""
    released = folder("transformers", version)
    (place / "transformers").mkdir(parents=True)
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
