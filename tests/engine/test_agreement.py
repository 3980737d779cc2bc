"""Two ranks on a real DeepSpeed 0.18.9 and gloo: the same repair on both, or who has trainfix names the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Once
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


# One process imports torch, and forks the ranks of each trial in turn, so that torch is imported once.
LAUNCHER = """
import json, os, signal, sys
import numpy, torch, torch.distributed.checkpoint
torch.set_num_threads(1)
trials = json.load(sys.stdin)
for folder, environments in trials:
    children = []
    for rank, environment in enumerate(environments):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # none may hang: a rank that does is killed, and has given no answer
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
            os.environ.update(environment)
            exec(os.environ["PROGRAM"])
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    open(f"{folder}/codes", "w").write(json.dumps(codes))
"""


@dataclass(frozen=True)
class Ended:
    """How one rank ended. `answer` is None when it said nothing."""

    code: int
    answer: dict[str, Any] | None
    err: str


# name -> what each rank does, and what is added to the last one's environment
TRIALS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "equal": (("same", "same"), {}),
    "off": (("same", "off"), {"TRAINFIX": "off"}),
    "disabled": (("same", "same"), {"TRAINFIX_DISABLE": "TF-0001,TF-0003,TF-0004"}),
    "dies": (("same", "dies"), {}),
    "different": (("same", "version"), {}),
    "store dies": (("dies", "same"), {}),
    "warn": (("version", "same"), {"TRAINFIX": "warn"}),
    "alone": (("same",), {}),
}


@pytest.fixture(scope="session")
def ranks(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Ended]]:
    """How the ranks of one trial ended."""
    found = once("agreement", lambda: _run({name: tmp_path_factory.mktemp("ranks") for name in TRIALS}))
    return lambda name: [Ended(**ended) for ended in found[name]]


def _run(folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """How each rank of each trial ended, as `Ended` takes it."""
    paths = [release("0.18.9"), standin.SOURCE, standin.ROOT]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONWARNINGS": "ignore", "PROGRAM": RANK}
    trials = [(str(folders[name]), _environments(*TRIALS[name])) for name in TRIALS]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        input=json.dumps(trials),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: _ended(folder) for name, folder in folders.items()}


def _environments(how: tuple[str, ...], extra: dict[str, str]) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = str(len(how))
    shared = {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"SECONDS": str(TIMEOUT)}
    own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "HOW": part} for rank, part in enumerate(how)]
    own[-1] |= extra
    return own


def _ended(folder: Path) -> list[dict[str, Any]]:
    found = []
    for rank, code in enumerate(json.loads((folder / "codes").read_text())):
        out, err = (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text()
        lines = [line for line in out.splitlines() if line.startswith('{"error"')]
        found.append({"code": code, "answer": json.loads(lines[-1]) if lines else None, "err": err})
    return found


def words(ended: Ended) -> str:
    """The error that a rank met."""
    assert ended.answer is not None, ended.err
    return str(ended.answer["error"])


Ranks = Callable[[str], list[Ended]]


def test_two_ranks_with_the_same_repair_agree_once_for_two_engines(ranks: Ranks) -> None:
    for ended in ranks("equal"):
        assert ended.answer is not None, ended.err
        assert ended.answer["error"] is None
        assert ended.answer["coefficients"] == [1.0, 1.0, 1.0, 1.0]
        fixes = ("offload_accumulation", "backward_division")
        assert ended.answer["exchanges"] == [f"trainfix/0/deepspeed.{name}/0.1" for name in fixes]


@pytest.mark.parametrize("trial", ["off", "disabled", "dies"])
def test_a_rank_without_the_repair_is_named_by_the_one_that_has_it(trial: str, ranks: Ranks) -> None:
    first, _ = ranks(trial)
    assert words(first).startswith(
        "UnfixedBugError: the ranks do not all run the same repair: rank 0 runs trainfix 0.1.0 "
        "deepspeed.offload_accumulation (TF-0001+TF-0003+TF-0004) "
        "on deepspeed 0.18.9, but rank 1 did not answer within 4 s "
        "(trainfix is missing, off or disabled there, or that rank has ended)"
    )
    assert "Start every rank in the same environment, with trainfix active." in words(first)
    assert first.answer is not None and TIMEOUT <= first.answer["seconds"] < TIMEOUT + 20


def test_two_different_repairs_are_named_by_both_ranks_at_once(ranks: Ranks) -> None:
    first, second = ranks("different")
    assert "UnfixedBugError" in words(first) and "UnfixedBugError" in words(second)
    assert "but rank 1 runs trainfix 0.0.9 deepspeed.offload_accumulation (TF-0001+TF-0003+TF-0004)" in words(first)
    assert "rank 1 runs trainfix 0.0.9" in words(second) and "but rank 0 runs trainfix 0.1.0" in words(second)


def test_the_rank_that_holds_the_store_dies_and_the_other_says_so(ranks: Ranks) -> None:
    first, second = ranks("store dies")
    assert first.code == 7
    assert "UnfixedBugError: the ranks do not all run the same repair" in words(second)
    assert "rank 0 did not answer within 4 s" in words(second) or "the rank that holds it has ended" in words(second)


def test_warn_turns_the_disagreement_into_a_warning(ranks: Ranks) -> None:
    _, second = ranks("warn")
    assert "the ranks do not all run the same repair" in second.err
    assert "UnfixedBugError" not in words(second)


def test_one_rank_has_nothing_to_agree_on(ranks: Ranks) -> None:
    (only,) = ranks("alone")
    assert only.answer is not None, only.err
    assert (only.answer["error"], only.answer["exchanges"]) == (None, [])
    assert only.answer["coefficients"] == [1.0, 1.0, 1.0, 1.0]


class Counting:
    """A store that notes its requests."""

    def __init__(self, store: Any) -> None:
        self.store, self.requests = store, []

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            self.requests.append(name)
            return getattr(self.store, name)(*arguments)

        return request


def exchanged(digests: list[str]) -> tuple[list[dict[int, str | None]], list[Counting]]:
    """What as many threads as digests, each a rank, learn from each other through one store of torch."""
    from torch.distributed import HashStore

    from trainfix.engine import agreement

    shared, ranks = HashStore(), tuple(range(len(digests)))
    stores = [Counting(shared) for _ in ranks]
    with ThreadPoolExecutor(max_workers=len(ranks)) as pool:
        jobs = [pool.submit(agreement._exchange, stores[r], "x", ranks, r, digests[r], 5.0) for r in ranks]
        return [job.result() for job in jobs], stores


def test_agreeing_costs_a_rank_the_same_few_requests_whatever_the_number_of_ranks() -> None:
    for size in (2, 64):
        found, stores = exchanged(["same"] * size)
        assert all(set(answer.values()) == {"same"} and len(answer) == size for answer in found)
        assert max(len([name for name in store.requests if name != "check"]) for store in stores) <= 6


def test_one_different_rank_of_many_is_named_by_every_rank() -> None:
    found, _ = exchanged(["same"] * 15 + ["other"])
    assert all(answer[15] == "other" and answer[0] == "same" for answer in found)
