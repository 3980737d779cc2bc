"""The child's program: runs a group of configurations, each in forks of this process, which has imported torch by then.

python -m tests.ledger.mutations.child FILE

A fork per rank: what is edited is imported in the fork, and nothing of a run is left for the next. Each fork writes
into its item's folder: what the optimizer consumed, call by call, an error if there was one, and the ledger's records.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.ledger.mutations.edits import Edit, install

AUDITED = 4
LOOPS = "tests.ledger.mutations.loops"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    finder = install([Edit(*one) for one in job["edits"]])  # of torch itself, in a process of their own
    for name in job["preload"]:
        importlib.import_module(name)
    for item in job["items"]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        forks = {}
        for rank in range(item["ranks"]):
            pid = os.fork()
            if not pid:
                _fork(item, rank, port, finder)
            forks[pid] = rank
        _wait(forks, Path(item["folder"]), time.monotonic() + job["seconds"])


def _wait(forks: dict[int, int], folder: Path, end: float) -> None:
    """Until all are through; one that fails takes the others along after a while."""
    while forks:
        for pid, rank in list(forks.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del forks[pid]
                if status:
                    end = min(end, time.monotonic() + 5)
                    if not (folder / f"error-{rank}").exists():
                        (folder / f"error-{rank}").write_text(f"the child ended with status {status}")
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                del forks[pid]
                (folder / f"error-{rank}").write_text("not finished within the timeout")
        time.sleep(0.02)


def _fork(item: dict[str, Any], rank: int, port: str, finder: Any) -> None:
    folder = Path(item["folder"])
    status = 1
    try:
        os.chdir(folder)
        log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _perform(item, rank, port, finder)
        status = 0
    except BaseException as error:
        traceback.print_exc()
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}"[:2000])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # tearing gloo down can abort a process that has already answered


def _perform(item: dict[str, Any], rank: int, port: str, finder: Any) -> None:
    folder = Path(item["folder"])
    os.environ.update(TRAINFIX="off", TRAINFIX_LEDGER=f"first:{AUDITED},out={folder}", TRAINFIX_QUIET="1")
    edited = install([Edit(*one) for one in item["edits"]])
    importlib.import_module("trainfix")
    untouched = ModuleType("untouched")  # what tests.support looks for
    untouched.__path__ = [str(Path(__file__).resolve().parents[3] / "src" / "trainfix")]
    sys.modules["untouched"] = untouched
    import numpy
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    torch.set_num_threads(1)
    if item["ranks"] > 1:
        ranks = str(item["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_SIZE=ranks)
        os.environ.update(LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=40))
    consumed: list[Any] = []

    def note(optimizer: Any, *_: Any) -> None:
        """Everything that this call of step is about to consume on this rank."""
        held = [one for group in optimizer.param_groups for one in group["params"]]
        parts = [
            torch.zeros(one.numel() if not hasattr(one, "to_local") else one.to_local().numel())
            if one.grad is None
            else (one.grad.to_local() if hasattr(one.grad, "to_local") else one.grad).detach().reshape(-1).float()
            for one in held
        ]
        consumed.append(torch.cat(parts).cpu().numpy().copy())

    register_optimizer_step_pre_hook(note)
    torch.manual_seed(1)
    importlib.import_module(f"{LOOPS}.{item['loop']}").train(**item["options"])
    edited.check()
    finder.check()
    numpy.savez(folder / f"consumed-{rank}.npz", *consumed)
    if item["ranks"] > 1:  # the first rank holds the store, and judges what the others handed in
        with contextlib.suppress(Exception):
            torch.distributed.monitored_barrier(timeout=timedelta(seconds=15))


if __name__ == "__main__":
    main()
