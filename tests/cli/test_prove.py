"""`trainfix prove` on real releases, as users start it: progress on stderr, the report on stdout, the exit code."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainfix.cli.proof_text import prove_text
from trainfix.cli.prove import SECONDS, Progress

from .test_commands import environment, release, shell

RIGHT = {"coefficients": [1.0, 1.0], "relative_error": 1e-8, "cosine": 1.0, "norm_ratio": 1.0}
WRONG = {"coefficients": [1.0, 0.0], "relative_error": 0.9, "cosine": 0.4, "norm_ratio": 0.5}


@pytest.mark.slow
def test_the_error_of_0_18_9_is_shown_and_gone_with_the_repair(tmp_path):
    report = tmp_path / "proof.json"
    argv = ("prove", "tf-0001", "--format", "json", "-o", str(report))
    answer = shell(*argv, env=environment(release("0.18.9")))
    assert (answer.returncode, answer.stdout) == (0, "")
    assert re.fullmatch(
        r"\[1/1\] TF-0001 shown, gone with the repair, \d+\.\d s\ntrainfix: report written to .*\n", answer.stderr
    )
    content = json.loads(report.read_text())
    assert (content["schema"], content["exit"], content["packages"]) == (1, 0, {"deepspeed": "0.18.9"})
    (proof,) = content["proofs"]
    assert (proof["applicable"], proof["reproduced"], proof["repaired"], proof["reason"]) == (True, True, True, None)
    assert proof["before"]["coefficients"] == pytest.approx([1, 0, 0, 0, 0, 0, 0, 1], abs=1e-3)
    assert proof["after"]["coefficients"] == pytest.approx([1] * 8, abs=1e-3)


def test_a_repaired_release_has_nothing_to_prove(trainfix, catalogue, monkeypatch):
    catalogue("TF-0014")  # without a proof: not among those that run when none is named
    monkeypatch.setenv("PYTHONPATH", str(release("0.19.8")))
    answer = trainfix("prove", installed=None)
    assert answer.code == 0
    for advisory_id in ("TF-0001", "TF-0003"):
        assert f"{advisory_id} on deepspeed 0.19.8: does not apply" in answer.out
    assert "TF-0014" not in answer.out + answer.err
    assert answer.out.endswith("none of these errors applies here (exit 0)\n")
    assert answer.err == ""


def test_an_unwritable_place_is_said_before_the_work(tmp_path):
    answer = shell("prove", "TF-0001", "-o", str(tmp_path / "absent/report"), env=environment(release("0.18.9")))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "absent is not a directory" in answer.stderr
    assert "TF-0001" not in answer.stderr


def slow_torch(folder: Path, *, runs_first: int) -> dict[str, str]:
    """DeepSpeed 0.18.9 with a torch that fails at once in the first processes, and in those after them never ends."""
    count = folder / "processes"
    (folder / "torch.py").write_text(
        f"""
import os, time
with open({str(count)!r}, "a+") as file:
    file.write(f"{{os.getpid()}}\\n")
    file.flush()
    file.seek(0)
    if len(file.readlines()) > {runs_first}:
        time.sleep(60)
raise ImportError("no torch")
"""
    )
    return environment(folder, release("0.18.9"))


def runs(pid: str) -> bool:
    """Whether the process is there, and not merely waiting to be collected by whoever collects orphans here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("runs_first", "said"),
    [
        (0, r"trainfix: interrupted before the first proof was done\n"),
        # Two interpreters that import beforehand, and two experiments.
        (4, r"\[1/9\] TF-0001 could not be run, .* s\ntrainfix: interrupted; 1 of 9 proofs were done: TF-0001\n"),
    ],
)
def test_an_interrupt_stops_the_children_and_says_what_was_done(runs_first, said, tmp_path):
    processes = tmp_path / "processes"
    process = subprocess.Popen(
        [sys.executable, "-m", "trainfix", "prove"],
        env=slow_torch(tmp_path, runs_first=runs_first),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = []
    until = time.monotonic() + 30
    while len(started) < runs_first + 2 and time.monotonic() < until:
        time.sleep(0.05)
        started = processes.read_text().split() if processes.exists() else []
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert re.fullmatch(said, err)
    assert len(started) == runs_first + 2
    while any(map(runs, started)):
        assert time.monotonic() < until + 60, "a child is still running"
        time.sleep(0.05)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def progress_on(stream: io.StringIO) -> str:
    progress = Progress(stream)
    progress(1, 2, "TF-0001", None)
    progress(1, 2, "TF-0001", record(seconds=7.12))
    return stream.getvalue()


def test_progress_is_one_line_per_finished_proof_and_on_a_terminal_also_what_runs_now(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    done = "[1/2] TF-0001 shown, gone with the repair, 7.1 s\n"
    assert progress_on(io.StringIO()) == done
    assert progress_on(Terminal()) == f"\r\033[K[1/2] TF-0001 ...\r\033[K{done}"
    monkeypatch.setenv("TERM", "dumb")
    assert progress_on(Terminal()) == done


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repaired": False}, "shown, NOT gone with the repair"),
        ({"repaired": None}, "shown"),
        ({"reproduced": False, "repaired": None}, "not shown"),
        ({"reproduced": None, "repaired": None}, "could not be run"),
        ({"applicable": False, "reproduced": False, "repaired": None}, "not there"),
        ({"applicable": False, "reproduced": True, "repaired": None}, "shown"),
    ],
)
def test_progress_tells_the_outcomes_apart(changes, words):
    stream = io.StringIO()
    Progress(stream)(1, 1, "TF-0001", record(**changes))
    assert stream.getvalue() == f"[1/1] TF-0001 {words}, 1.0 s\n"


@pytest.mark.parametrize(("argv", "seconds"), [((), SECONDS), (("TF-0001",), None)])
def test_what_the_user_names_is_proved_however_long_it_takes(trainfix, monkeypatch, argv, seconds):
    asked = {}

    def prove_all(ids, **how):
        asked.update(how)
        return []

    monkeypatch.setattr("trainfix.proofs.prove_all", prove_all)
    assert trainfix("prove", *argv).code == 0
    assert (asked["seconds"], asked["named"]) == (seconds, list(argv))


def record(**changes: object) -> dict[str, object]:
    base = {"id": "TF-0001", "package": "deepspeed", "installed": "0.18.9", "applicable": True, "reproduced": True}
    return {**base, "repaired": True, "reason": None, "before": WRONG, "after": RIGHT, "seconds": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, ["shown, and gone with the repair", "############  1.000", "0.000", "(exit 0)"]),
        ({"repaired": False, "after": WRONG}, 1, ["shown, and NOT repaired", "still there with the repair (exit 1)"]),
        ({"reproduced": False, "after": None}, 3, ["the error did not show", "could not be shown here (exit 3)"]),
        (
            {"reproduced": None, "before": None, "after": None, "reason": "no torch"},
            3,
            ["could not be run", "no torch"],
        ),
        ({"applicable": None, "reproduced": None, "before": None, "after": None}, 3, ["could not be run"]),
        ({"applicable": False, "repaired": None, "after": None}, 1, ["not listed as affected, but the error shows"]),
        (
            {"applicable": False, "reproduced": None, "before": None, "after": None},
            0,
            ["does not apply", "none of these"],
        ),
    ],
)
def test_the_text_tells_the_outcomes_apart(changes, code, words):
    text = prove_text([record(**changes)], code, colour=False)
    for word in words:
        assert word in text
    assert "\033" not in text


def test_a_dropped_micro_batch_is_red_on_a_terminal():
    text = prove_text([record()], 0, colour=True)
    assert "\033[31m              0.000" in text
    assert "\033[32m############  1.000" in text
