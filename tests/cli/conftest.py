"""The command line on real DeepSpeed releases, run in this process: doctor imports nothing of what it examines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.releases import release
from trainfix import advisories
from trainfix.cli import main

OFFLOADED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


@dataclass(frozen=True)
class Answer:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def finding(self, advisory_id: str = "TF-0001") -> Any:
        """One finding of doctor's JSON."""
        return next(one for one in self.json["findings"] if one["id"] == advisory_id)


@pytest.fixture
def trainfix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs one command line in an empty current folder, as if DeepSpeed `installed` were installed there."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, installed: str | Path | None = "0.18.9") -> Answer:
        with monkeypatch.context() as patch:
            if installed is not None:
                patch.syspath_prepend(str(release(installed) if isinstance(installed, str) else installed))
            code = main(argv)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture
def catalogue(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """A catalogue of TF-0001 and TF-0003 alone. It gives a function that adds a know-only record made from TF-0001's,
    with changes to the part that is ours, and to `summary` and `introduced`."""
    real, folder = advisories.RECORDS, tmp_path_factory.mktemp("records")
    for advisory_id in ("TF-0001", "TF-0003"):
        shutil.copy(real / f"{advisory_id}.json", folder)
    monkeypatch.setattr(advisories, "RECORDS", folder)
    advisories.load_all.cache_clear()

    def add(
        advisory_id: str, *, summary: str = "An error that we have only read of", introduced: str = "", **ours: Any
    ) -> None:
        record = json.loads((real / "TF-0001.json").read_text())
        record |= {"id": advisory_id, "summary": summary}
        events = record["affected"][0]["ranges"][0]["events"]
        events[0] = {"introduced": introduced or events[0]["introduced"]}
        changes = {"fix": None, "proof": None, "source_patches": [], "evidence_level": "read", **ours}
        record["database_specific"]["trainfix"] |= changes
        if record["database_specific"]["trainfix"]["ways_out"]["upgrade"] is None:
            events[1] = {"last_affected": "0.19.8"}
        (folder / f"{advisory_id}.json").write_text(json.dumps(record))
        advisories.load_all.cache_clear()

    def keep(advisory_id: str) -> None:
        shutil.copy(real / f"{advisory_id}.json", folder)
        advisories.load_all.cache_clear()

    add.keep = keep  # a record as it is
    yield add
    advisories.load_all.cache_clear()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a JSON config below the current folder and gives its name."""

    def put(content: Mapping[str, Any] = OFFLOADED, name: str = "ds.json") -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return name

    return put


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder on the path with the metadata of packages: name, version, and the lines of METADATA that matter."""
    folder = tmp_path / "site"

    def install(name: str, version: str, *lines: str) -> Path:
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        head = [f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}", *lines]
        metadata.write_text("\n".join(head) + "\n\nA description that mentions deepspeed.\n")
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return install
