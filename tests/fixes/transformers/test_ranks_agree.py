"""Two ranks build transformers' Trainer, one without trainfix or with another release: they stop by name."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support import stacks
from tests.support.stacks import stack

pytestmark = pytest.mark.slow

SECONDS = 4
RANK = """
import json, os, sys
from types import ModuleType
if os.environ["TRAINFIX"] == "on":
    import trainfix
    import trainfix.engine.agreement as agreement
    agreement.TIMEOUT_SECONDS = float(os.environ["SECONDS"])
untouched = sys.modules["untouched"] = ModuleType("untouched")
from tests.support import stacks, trainer_runs
untouched.__path__ = [str(stacks.SOURCE / "trainfix")]
import torch
torch.distributed.init_process_group("gloo")
from untouched.proofs import token_experiment
import transformers
error = None
try:
    arguments = trainer_runs.training_arguments(trainer_runs.Configuration(steps=4))
    transformers.Trainer(model=token_experiment.tiny_llama(), args=arguments)
except Exception as problem:
    error = f"{type(problem).__name__}: {problem}"
print(json.dumps({"error": error}), file=sys.__stdout__, flush=True)
os._exit(0)
"""


def start(ranks: Sequence[tuple[str, Mapping[str, str]]]) -> list[str | None]:
    """The error of each rank, given as (TRAINFIX, packages)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SECONDS": str(SECONDS)}
    children = []
    with tempfile.TemporaryDirectory() as folder:
        for rank, (mode, packages) in enumerate(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TRAINFIX": mode}
            env = stacks.environment(*stack(**packages), trainfix=True) | shared | place
            out = Path(folder, f"out{rank}")
            with out.open("w") as file:
                child = subprocess.Popen([sys.executable, "-c", RANK], env=env, stdout=file, stderr=file)
            children.append((child, out))
        answers = []
        for child, out in children:
            child.wait(timeout=120)
            text = out.read_text()
            lines = [line for line in text.splitlines() if line.startswith('{"error"')]
            assert lines, text[-2000:]
            answers.append(json.loads(lines[-1])["error"])
    return answers


def test_a_rank_without_trainfix_is_named() -> None:
    first, second = start([("on", {"transformers": "4.53.3"}), ("off", {"transformers": "4.53.3"})])
    assert first is not None and second is None
    assert first.startswith("UnfixedBugError: the ranks do not all run the same repair: rank 0 runs trainfix")
    assert "transformers.windows (TF-0402" in first
    assert f"rank 1 did not answer within {SECONDS} s" in first


def test_ranks_with_different_releases_both_stop_and_name_each_other() -> None:
    first, second = start([("on", {"transformers": "4.53.3"}), ("on", {"transformers": "4.52.4"})])
    assert first is not None and second is not None
    assert "UnfixedBugError" in first and "on transformers 4.52.4" in first and "rank 1 runs" in first
    assert "UnfixedBugError" in second and "on transformers 4.53.3" in second and "rank 0 runs" in second
