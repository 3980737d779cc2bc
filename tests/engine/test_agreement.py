"""Two ranks on a real DeepSpeed 0.18.9 and gloo: the same repair on both, or who has trainfix names the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import standin
from tests.support.releases import release

pytestmark = pytest.mark.slow

TIMEOUT = 4
# What each rank does. HOW is its part: same, off, version, dies.
RANK = """
import json, os, sys, time
from types import ModuleType
how, rank = os.environ["HOW"], int(os.environ["RANK"])
if how != "off":
    import trainfix
    import trainfix.engine.agreement as agreement
    agreement.TIMEOUT_SECONDS = float(os.environ["SECONDS"])
    exchanges = []
    exchange = agreement._exchange
    agreement._exchange = lambda *args: exchanges.append(args[1]) or exchange(*args)
if how == "version":
    trainfix.__version__ = "0.0.9"
untouched = sys.modules["untouched"] = ModuleType("untouched")
from tests.support import experiment
untouched.__path__ = [str(experiment.SOURCE / "trainfix")]
deepspeed = experiment._start()
if how == "dies":  # at the last moment before the ranks compare
    agreement._exchange = lambda *args: os._exit(7)
begin = time.monotonic()
answer = {"error": None}
try:
    trials = [experiment.Trial(deepspeed, experiment.Configuration(ga=4)) for _ in range(2)]
    answer["coefficients"] = [round(value, 3) for value in trials[0].window()["coefficients"]]
    answer["exchanges"] = exchanges
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}"
answer["seconds"] = time.monotonic() - begin
print(json.dumps(answer), flush=True)
os._exit(0)
"""


@dataclass(frozen=True)
class Ended:
    """How one rank ended. `answer` is None when it said nothing."""

    code: int
    answer: dict[str, Any] | None
    err: str


def ranks(*how: str, **env: str) -> list[Ended]:
    """Run one process per entry of `how`; `env` is added to the last one's environment. None may hang."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [release("0.18.9"), standin.SOURCE, standin.ROOT]
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONWARNINGS": "ignore",
        "WORLD_SIZE": str(len(how)),
        "LOCAL_SIZE": str(len(how)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SECONDS": str(TIMEOUT),
    }
    children = []
    for rank, part in enumerate(how):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "HOW": part} | (env if rank == len(how) - 1 else {})
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen([sys.executable, "-c", RANK], env=shared | own, **streams))
    end = time.monotonic() + 120
    try:
        spoken = [child.communicate(timeout=max(1, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()
    return [_ended(child.returncode, out, err) for child, (out, err) in zip(children, spoken, strict=True)]


def _ended(code: int, out: str, err: str) -> Ended:
    lines = [line for line in out.splitlines() if line.startswith('{"error"')]
    return Ended(code, json.loads(lines[-1]) if lines else None, err)


def words(ended: Ended) -> str:
    """The error that a rank met."""
    assert ended.answer is not None, ended.err
    return str(ended.answer["error"])


def test_two_ranks_with_the_same_repair_agree_once_for_two_engines() -> None:
    for ended in ranks("same", "same"):
        assert ended.answer is not None, ended.err
        assert ended.answer["error"] is None
        assert ended.answer["coefficients"] == [1.0, 1.0, 1.0, 1.0]
        assert ended.answer["exchanges"] == ["trainfix/0/deepspeed.offload_accumulation/0.1"]


@pytest.mark.parametrize(
    ("how", "env"),
    [("off", {"TRAINFIX": "off"}), ("same", {"TRAINFIX_DISABLE": "TF-0001,TF-0003"}), ("dies", {})],
    ids=["off", "disabled", "dies before"],
)
def test_a_rank_without_the_repair_is_named_by_the_one_that_has_it(how: str, env: dict[str, str]) -> None:
    first, _ = ranks("same", how, **env)
    assert words(first).startswith(
        "UnfixedBugError: the ranks do not all run the same repair: rank 0 runs trainfix 0.1.0 "
        "deepspeed.offload_accumulation (TF-0001+TF-0003) on deepspeed 0.18.9, but rank 1 did not answer within 4 s "
        "(trainfix is missing, off or disabled there, or that rank has ended)"
    )
    assert "Start every rank in the same environment, with trainfix active." in words(first)
    assert first.answer is not None and TIMEOUT <= first.answer["seconds"] < TIMEOUT + 20


def test_two_different_repairs_are_named_by_both_ranks_at_once() -> None:
    first, second = ranks("same", "version")
    assert "UnfixedBugError" in words(first) and "UnfixedBugError" in words(second)
    assert "but rank 1 runs trainfix 0.0.9 deepspeed.offload_accumulation (TF-0001+TF-0003)" in words(first)
    assert "rank 1 runs trainfix 0.0.9" in words(second) and "but rank 0 runs trainfix 0.1.0" in words(second)


def test_the_rank_that_holds_the_store_dies_and_the_other_says_so() -> None:
    first, second = ranks("dies", "same")
    assert first.code == 7
    assert "UnfixedBugError: the ranks do not all run the same repair" in words(second)
    assert "rank 0 did not answer within 4 s" in words(second) or "the rank that holds it has ended" in words(second)


def test_warn_turns_the_disagreement_into_a_warning() -> None:
    _, second = ranks("version", "same", TRAINFIX="warn")
    assert "the ranks do not all run the same repair" in second.err
    assert "UnfixedBugError" not in words(second)


def test_one_rank_has_nothing_to_agree_on() -> None:
    (only,) = ranks("same")
    assert only.answer is not None, only.err
    assert (only.answer["error"], only.answer["exchanges"]) == (None, [])
    assert only.answer["coefficients"] == [1.0, 1.0, 1.0, 1.0]
