"""Runs faults and healthy variants in child processes, two at a time, and says what the ledger found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from tests.ledger.mutations.edits import Edit
from tests.ledger.mutations.faults import Fault
from tests.ledger.mutations.healthy import BY_NAME, Run
from tests.support import stacks

SECONDS = 60  # for one run
ACTIVE = 1e-4  # a fault changes the consumed gradient by more than this
PROGRAM = "tests.ledger.mutations.child"
# What is imported once for many forks: all of it, or only what no edit of transformers or accelerate touches.
_BELOW = [
    "torch",
    "torch.distributed.fsdp",
    "numpy",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "pandas",
    "datasets",
]
_ALL = [*_BELOW, "transformers", "transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate"]


@dataclass
class Found:
    """What one run gave. consumed: rank -> the consumed gradients, call by call."""

    error: str | None
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    consumed: dict[int, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A run, with edits or without."""

    name: str
    run: Run
    edits: tuple[Edit, ...] = ()

    @property
    def group(self) -> tuple[Any, ...]:
        """What can share a child."""
        packages = {edit.module.split(".")[0] for edit in self.edits}
        kind = (
            f"torch {self.name}"
            if "torch" in packages
            else "below"
            if packages & {"transformers", "accelerate"}
            else "all"
        )
        return self.run.ranks, tuple(sorted(self.run.packages.items())), kind


def of_fault(fault: Fault) -> Item:
    return Item(fault.name, BY_NAME[fault.run], fault.edits)


def of_run(run: Run) -> Item:
    return Item(run.name, run)


def perform(items: Iterable[Item]) -> dict[str, Found]:
    """Name -> what its run gave. Two children of one rank at a time, or one of two ranks."""
    groups: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    single = [half for key, own in groups.items() if key[0] == 1 for half in _halves(own)]
    double = [own for key, own in groups.items() if key[0] > 1]
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        for wanted, workers in ((single, 2), (double, 1)):
            with ThreadPoolExecutor(workers) as pool:
                for some in pool.map(lambda own: _child(own, Path(folder)), sorted(wanted, key=len, reverse=True)):
                    found |= some
    return found


def _halves(items: list[Item]) -> list[list[Item]]:
    middle = (len(items) + 1) // 2
    return [items] if len(items) < 6 else [items[:middle], items[middle:]]


def _child(items: Sequence[Item], folder: Path) -> dict[str, Found]:
    folder = Path(tempfile.mkdtemp(dir=folder))
    own = items[0]
    early = [edit for edit in own.edits if edit.module.split(".")[0] == "torch"]
    job: dict[str, Any] = {
        "seconds": SECONDS,
        "preload": _BELOW if own.group[2] == "below" else _ALL,
        "edits": [_plain(edit) for edit in early],
        "items": [],
    }
    for number, item in enumerate(items):
        place = folder / str(number)
        place.mkdir()
        edits = [_plain(edit) for edit in item.edits if edit not in early]
        how = {"loop": item.run.loop, "options": dict(item.run.options), "ranks": item.run.ranks}
        job["items"].append(how | {"folder": str(place), "edits": edits})
    (folder / "job.json").write_text(json.dumps(job))
    overlays = stacks.stack(**own.run.packages) if own.run.packages else []
    problem = None
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROGRAM, str(folder / "job.json")],
            env=stacks.environment(*overlays, trainfix=False),
            capture_output=True,
            text=True,
            timeout=SECONDS * (1 + len(items)),
            check=False,
        )
        if done.returncode:
            problem = f"the child died with {done.returncode}: {done.stderr.strip()[-1000:]}"
    except subprocess.TimeoutExpired:
        problem = "not finished within the timeout"
    return {item.name: _read(folder / str(number), problem) for number, item in enumerate(items)}


def _plain(edit: Edit) -> list[str]:
    return [edit.module, edit.old, edit.new]


def _read(folder: Path, problem: str | None) -> Found:
    errors = [file.read_text() for file in sorted(folder.glob("error-*"))]
    found = Found("; ".join(errors) or None)
    for file in sorted(folder.glob("consumed-*.npz")):
        with numpy.load(file) as arrays:
            found.consumed[int(file.stem.rpartition("-")[2])] = [arrays[name] for name in arrays.files]
    if found.error is None and not found.consumed:
        found.error = problem or "no optimizer step was seen"
    lines = [line for file in sorted(folder.glob("ledger-*.jsonl")) for line in file.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    found.verdicts = [one for one in records if one["kind"] == "window"]
    found.notes = [one["text"] for one in records if one["kind"] == "note"]
    return found


def changed(right: Found, wrong: Found, windows: int) -> tuple[int | None, float]:
    """The window from which on the consumed gradient differs, and by how much at most, relative to the right one."""
    first, most = None, 0.0
    for rank, calls in right.consumed.items():
        others = wrong.consumed.get(rank, [])
        per_window = max(1, len(calls) // windows)
        for number, (one, other) in enumerate(zip(calls, others, strict=False)):
            size = float(numpy.linalg.norm(one)) or 1.0
            # Other numbers of elements: other parameters are stepped
            off = float(numpy.linalg.norm(one - other)) / size if one.shape == other.shape else 1.0
            if not off <= ACTIVE:
                window = number // per_window + 1
                first = window if first is None else min(first, window)
                most = max(most, off)
    return first, most
