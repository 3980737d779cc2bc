"""Many proofs at once: their order, how many processes are busy, how long they may take, and how they end.

A stand-in for torch decides what an experiment does, and so the interpreter that imports it beforehand.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.releases import release
from tests.support.stacks import stack
from trainfix import proofs
from trainfix.advisories import load_all
from trainfix.proofs import exit_code, prove_all

from .test_prove import environment

EVERY_ID = [one.id for one in load_all() if one.proof]
OF_0_18_9 = [  # by gravity, then by how long they take
    *("TF-0001", "TF-0003", "TF-0004", "TF-0005", "TF-0032", "TF-0042"),
    *("TF-0006", "TF-0007"),  # two ranks
    "TF-0009",  # a loss of precision
]


class Seen:
    """Writes the progress down: ``began TF-0001`` and ``ended TF-0001``."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.totals: set[int] = set()

    def __call__(self, number: int, total: int, advisory_id: str, record: Mapping[str, Any] | None) -> None:
        self.totals.add(total)
        self.events.append(f"{'began' if record is None else 'ended'} {advisory_id}")


def with_torch(folder: Path, source: str) -> dict[str, str]:
    """DeepSpeed 0.18.9 with a torch that does this when it is imported."""
    (folder / "torch.py").write_text(source)
    return environment(folder, release("0.18.9"))


def logged_starts(folder: Path) -> tuple[str, Path]:
    """(an interpreter that writes a line each time it starts, the file with the lines)."""
    log, python = folder / "starts", folder / "python"
    python.write_text(f'#!/bin/sh\necho started >> "{log}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python), log


def test_the_gravest_and_quickest_run_first_and_the_records_come_as_they_were_asked_for(tmp_path: Path) -> None:
    seen = Seen()
    records = prove_all(EVERY_ID, progress=seen, env=with_torch(tmp_path, "raise ImportError('no torch')"))
    assert [record["id"] for record in records] == EVERY_ID
    assert seen.events == [f"{what} {one}" for one in OF_0_18_9 for what in ("began", "ended")]
    assert seen.totals == {len(OF_0_18_9)}
    assert {record["id"] for record in records if record["applicable"]} == set(OF_0_18_9)


@pytest.mark.parametrize(("ids", "at_once"), [(["TF-0001", "TF-0003"], 2), (["TF-0006"], 1)], ids=["1 rank", "2 ranks"])
def test_no_more_than_two_processes_are_busy(ids: list[str], at_once: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = f"""
import time
def note(change):
    with open({str(log)!r}, "a") as log:
        log.write(f"{{time.monotonic()}} {{change}}\\n")
note("+1")
time.sleep(0.3)
note("-1")
raise ImportError("no torch")
"""
    prove_all(ids, env=with_torch(tmp_path, source))
    changes = sorted((float(when), int(change)) for when, change in map(str.split, log.read_text().splitlines()))
    assert len(changes) >= 2 * 2 * len(ids)  # begin and end, without and with the repair
    running = [sum(change for _, change in changes[: k + 1]) for k in range(len(changes))]
    assert (max(running), running[-1]) == (at_once, 0)


def test_the_experiments_that_are_two_processes_are_known() -> None:
    modules = Path(proofs.__file__).parent.glob("tf_*.py")
    assert {path.stem for path in modules if re.search(r"ranks=[^1]", path.read_text())} == proofs.TWO_RANKS


def test_what_does_not_apply_starts_no_interpreter(tmp_path: Path) -> None:
    python, starts = logged_starts(tmp_path)
    seen = Seen()
    records = prove_all(EVERY_ID, progress=seen, python=python, env=environment())
    assert starts.read_text().splitlines() == ["started"]  # to ask for its search path, once for all
    assert (seen.events, exit_code(records)) == ([], 0)
    assert {record["seconds"] for record in records} == {0.0}


def test_all_experiments_share_two_interpreters(tmp_path: Path) -> None:
    python, starts = logged_starts(tmp_path)
    prove_all(EVERY_ID, python=python, env=with_torch(tmp_path, "raise ImportError('no torch')"))
    assert starts.read_text().splitlines() == ["started"] * 3  # the search path, without the repairs, with them


def test_what_has_not_run_when_the_time_is_over_says_so_and_nothing_is_left_running(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    source = f"import os, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(60)"
    begin = time.monotonic()
    seen, ids = Seen(), ["TF-0001", "TF-0003", "TF-0013"]
    records = prove_all(ids, progress=seen, seconds=1.5, env=with_torch(tmp_path, source))
    assert time.monotonic() - begin < 10
    over = "the 1.5 s for all proofs are over; run it alone with `trainfix prove {}`"
    assert [record["reason"] for record in records] == [
        f"the experiment could not be run: {over.format('TF-0001')}",
        f"not run: {over.format('TF-0003')}",
        "deepspeed 0.18.9 is not-affected",
    ]
    assert {(record["reproduced"], record["repaired"]) for record in records} == {(None, None)}
    assert seen.events == ["began TF-0001", "ended TF-0001", "ended TF-0003"]
    assert exit_code(records) == 3
    started = pids.read_text().split()
    assert len(started) == 2
    assert not [pid for pid in started if os.path.exists(f"/proc/{pid}")]


def test_an_interpreter_that_dies_is_told_apart_and_the_next_proof_gets_another(tmp_path: Path) -> None:
    source = "import os, sys\nprint('a bug in a library', file=sys.stderr, flush=True)\nos._exit(7)"
    records = prove_all(["TF-0001", "TF-0003"], env=with_torch(tmp_path, source))
    died = "the experiment could not be run: the child ended with 7: a bug in a library"
    assert [record["reason"] for record in records] == [died, died]


@pytest.mark.slow
def test_all_errors_of_a_typical_stack_are_shown_and_gone_in_far_less_than_90_seconds_on_two_cores() -> None:
    folders = stack(deepspeed="0.18.9", transformers="4.46.3")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    records = prove_all(EVERY_ID, env=environment(*folders))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    applicable = {
        record["id"]: (record["reproduced"], record["repaired"]) for record in records if record["applicable"]
    }
    of_the_trainers = {"TF-0402", "TF-0403", "TF-0405", "TF-0408", "TF-0409", "TF-0410", "TF-0501"}
    assert applicable == dict.fromkeys({*OF_0_18_9, *of_the_trainers}, (True, True))
    assert exit_code(records) == 0
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 90  # of the 180 that two cores have; 38 when this was written
