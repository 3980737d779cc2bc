"""The launchers themselves, as people start them, below ``trainfix run``: every process that trains is active."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.activation.children import below_run, without_trainfix
from tests.support import llamafactory_runs, stacks, trl_runs
from tests.support.releases import release

pytestmark = pytest.mark.slow

ROOT = stacks.ROOT
BIN = Path(sys.executable).parent

# A sitecustomize of the user's: every process says at its end what it was, and how it stood.
SAY = """
import atexit, os, sys
def say():
    kinds = {type(finder).__module__ for finder in sys.meta_path}
    state = "active" if "trainfix.engine.finder" in kinds else "waiting" if "_trainfix_waiting" in kinds else "plain"
    with open(os.environ["SAID"], "a") as file:
        file.write(" ".join([state, *sys.orig_argv]) + "\\n")
atexit.register(say)
"""


class Launch:
    """What a command did below ``trainfix run``: `processes` are its Python processes, state and command line."""

    def __init__(self, folder: Path, folders: Sequence[Path], *command: object, **variables: str) -> None:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SAY)
        env = without_trainfix(folder / "site", *folders, **variables)
        env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "SAID": str(folder / "said"), "DS_ACCELERATOR": "cpu"}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_DISABLED": "true"}
        self.done: subprocess.CompletedProcess[str] = below_run(*command, env=env, cwd=folder)
        self.processes = [tuple(line.split(" ", 1)) for line in (folder / "said").read_text().splitlines()]

    def states(self, words: str) -> list[str]:
        """The states of the processes whose command line has these words, without `trainfix run` itself."""
        found = [state for state, line in self.processes if words in line]
        assert found, (words, self.processes, self.done.stderr)
        return found

    def check(self) -> None:
        """No process of the launcher's is without us."""
        assert {state for state, _ in self.processes} <= {"active", "waiting"}, self.processes


def test_accelerate_launch(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import accelerate")
    options = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
    launch = Launch(tmp_path, [], "accelerate", "launch", *options, "--dynamo_backend", "no", "train.py")
    assert launch.done.returncode == 0, launch.done.stderr
    assert launch.states("python train.py") == ["active"]
    launch.check()


def test_deepspeeds_launcher(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import accelerate")
    folder = release("0.18.9")
    launch = Launch(tmp_path, [folder], "python", folder / "bin" / "deepspeed", "--num_gpus", "1", "train.py")
    assert launch.done.returncode == 0, launch.done.stderr
    assert launch.states("train.py --local_rank=0") == ["active"]
    launch.check()


def test_llamafactory_cli_that_starts_torchrun_itself(tmp_path: Path) -> None:
    """The settings are empty, so that LLaMA-Factory ends as soon as it has imported its trainers."""
    (tmp_path / "train.yaml").write_text("{}")
    folders = llamafactory_runs.stack("0.9.5")
    command = stacks.folder("llamafactory", "0.9.5") / "bin" / "llamafactory-cli"
    torchrun = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"}
    launch = Launch(tmp_path, folders, "python", command, "train", "train.yaml", **torchrun)
    assert launch.states("launcher.py train.yaml")[:1] == ["active"], launch.done.stderr
    assert launch.states("torchrun --nnodes") == ["active"]
    launch.check()


def test_trl_sft_that_is_accelerates_launcher(tmp_path: Path) -> None:
    """There is no such model, so that TRL ends as soon as it has imported its trainer."""
    command = stacks.folder("trl", "0.24.0") / "bin" / "trl"
    names = ("--model_name_or_path", "nowhere", "--dataset_name", "nowhere")
    launch = Launch(
        tmp_path, trl_runs.stack("0.24.0", "4.55.0"), "python", command, "sft", *names, "--num_processes", "1"
    )
    assert launch.states("scripts/sft.py") == ["active"], launch.done.stderr
    launch.check()


# Ranks agree.


def ranks(folder: Path, **variables: str) -> tuple[int, list[dict[str, Any]]]:
    """torchrun's exit code, and the answers of two ranks on DeepSpeed 0.18.9."""
    env = stacks.environment(release("0.18.9"), trainfix=True) | {"ANSWER_FOLDER": str(folder)} | variables
    command = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "tests.activation.rank")
    done = below_run(*command, env=env, cwd=ROOT)
    answers = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    assert answers, done.stderr
    return done.returncode, answers


def test_two_ranks_of_torchrun_agree_and_keep_every_micro_batch(tmp_path: Path) -> None:
    code, answers = ranks(tmp_path)
    assert code == 0
    assert [(one["active"], one["error"]) for one in answers] == [(True, None), (True, None)]
    assert [one["coefficients"] for one in answers] == [[1.0, 1.0, 1.0, 1.0]] * 2


def test_a_rank_of_torchrun_with_trainfix_off_is_named_and_the_run_stops(tmp_path: Path) -> None:
    code, answers = ranks(tmp_path, ODD_RANK="1")
    assert code != 0
    assert (answers[0]["rank"], answers[0]["active"]) == (0, True)
    assert answers[0]["error"].startswith("UnfixedBugError: the ranks do not all run the same repair: rank 0 runs")
    assert "but rank 1 did not answer within 4 s (trainfix is missing, off or disabled there" in answers[0]["error"]
    assert [one for one in answers[1:] if one["active"] or not one["error"]] == []  # stopped with the other, or by it
