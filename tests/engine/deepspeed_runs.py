"""Runs on a real DeepSpeed 0.18.9, one rank, each in a fork of an interpreter that has imported only torch.

`python -m tests.engine.deepspeed_runs` reads a JSON list of {"run": name, "release": folder, "env": {...}} and prints a
JSON list of what each run found: the dictionary that its function here returns, "error" (null or the error's words) and
"said" (what went to stderr).
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tests.support import experiment
from tests.support.experiment import Configuration, Trial

SECONDS = 60
STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2"


def start() -> ModuleType:
    """DeepSpeed, imported and in a group of its own."""
    untouched = ModuleType("untouched")
    untouched.__path__ = [str(experiment.SOURCE / "trainfix")]
    sys.modules["untouched"] = untouched
    return experiment._start()


def coefficients(deepspeed: ModuleType, trial: Trial | None = None, **values: Any) -> list[float]:
    """The micro-batch coefficients of one window."""
    trial = trial or Trial(deepspeed, Configuration(**values))
    return [round(value, 4) for value in trial.window()["coefficients"]]


def states() -> dict[str, str]:
    """Of the two errors that these runs are about."""
    import trainfix

    return {record.id: record.state for record in trainfix.status() if record.id in ("TF-0001", "TF-0003")}


def trainfix_first() -> dict[str, Any]:
    import trainfix  # noqa: F401

    deepspeed = start()
    return {"coefficients": coefficients(deepspeed), "states": states()}


def deepspeed_first() -> dict[str, Any]:
    deepspeed = start()
    import trainfix  # noqa: F401

    return {"coefficients": coefficients(deepspeed), "states": states()}


def engine_first() -> dict[str, Any]:
    deepspeed = start()
    trial = Trial(deepspeed, Configuration())
    import trainfix  # noqa: F401

    return {"coefficients": coefficients(deepspeed, trial), "states": states()}


def between_halves() -> dict[str, Any]:
    """A module that DeepSpeed's stage_1_and_2 imports brings in trainfix."""
    small = "deepspeed.utils.bwc"

    class Bringer:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == STAGE_2:
                sys.modules.pop(small, None)  # so that it is imported once more, from there
            if name == small and STAGE_2 in sys.modules:
                half.append(not hasattr(sys.modules[STAGE_2], "DeepSpeedZeroOptimizer"))
                importlib.import_module("trainfix")

    half: list[bool] = []
    sys.meta_path.insert(0, Bringer())
    deepspeed = start()
    return {"half": half, "coefficients": coefficients(deepspeed), "states": states()}


def from_import() -> dict[str, Any]:
    start()
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Taken

    before = Taken.copy_grads_in_partition
    import trainfix

    replaced = Taken.copy_grads_in_partition is not before
    trainfix.revert()
    return {"replaced": replaced, "back": Taken.copy_grads_in_partition is before, "states": states()}


def reload() -> dict[str, Any]:
    """The engine's module has the class from before the reload, the reloaded module the new one: both are repaired."""
    import trainfix

    deepspeed = start()
    old = sys.modules[STAGE_2].DeepSpeedZeroOptimizer
    new = importlib.reload(sys.modules[STAGE_2]).DeepSpeedZeroOptimizer
    answer = {"coefficients": coefficients(deepspeed), "states": states(), "new class": new is not old}
    engine = sys.modules["deepspeed.runtime.engine"]
    engine.DeepSpeedZeroOptimizer = new
    answer["with the new class"] = coefficients(deepspeed)
    trainfix.revert()
    answer["reverted"] = coefficients(deepspeed)
    engine.DeepSpeedZeroOptimizer = old
    answer["reverted, old class"] = coefficients(deepspeed)
    return answer


def threads() -> dict[str, Any]:
    """Two threads import DeepSpeed, and a third trainfix, at once."""
    begin = threading.Barrier(3)

    def bring(name: str) -> None:
        begin.wait()
        importlib.import_module(name)

    names = ("deepspeed", "trainfix", "deepspeed")
    workers = [threading.Thread(target=bring, args=(name,), daemon=True) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    alive = [worker.is_alive() for worker in workers]
    deepspeed = start()
    return {"alive": alive, "coefficients": coefficients(deepspeed), "states": states()}


def back_and_forth() -> dict[str, Any]:
    import trainfix

    deepspeed = start()
    trial = Trial(deepspeed, Configuration())
    found = [coefficients(deepspeed, trial)]
    for change in (trainfix.revert, trainfix.apply, trainfix.apply):
        change()
        found.append(coefficients(deepspeed, trial))
    return {"coefficients": found, "states": states()}


def fork() -> dict[str, Any]:
    """After DeepSpeed is imported and before there is a group: gloo's own threads do not survive a fork."""
    import trainfix  # noqa: F401

    importlib.import_module(STAGE_2)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(coefficients(start())).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = json.loads(pipe.read())
    os.waitpid(child, 0)
    return {"coefficients": found, "states": states()}


def look() -> dict[str, Any]:
    """The states after the import, and what became of the guarded and the replaced functions."""
    import trainfix

    start()
    zero = vars(sys.modules[STAGE_2].DeepSpeedZeroOptimizer)
    names = ("__init__", "copy_grads_in_partition", "reduce_ipg_grads", "reset_cpu_buffers")
    touched = [name for name in names if type(zero[name]).__name__ != "function" or hasattr(zero[name], "__wrapped__")]
    reasons = {record.id: record.reason for record in trainfix.status()}
    return {"states": states(), "reasons": reasons, "touched": touched}


def four_steps() -> dict[str, Any]:
    return look() | {"coefficients": coefficients(sys.modules["deepspeed"], ga=4)}


def two_steps() -> dict[str, Any]:
    return look() | {"coefficients": coefficients(sys.modules["deepspeed"], ga=2)}


def driven_to_four() -> dict[str, Any]:
    """TF-0003: the engine knows of one step, and the loop sets the boundary."""
    return look() | {"coefficients": coefficients(sys.modules["deepspeed"], ga=4, driver="accelerate")}


def zenflow() -> dict[str, Any]:
    """An engine with ZenFlow, update interval 4; what its own optimizer would need comes after the guard."""
    answer = look()
    import torch

    deepspeed = sys.modules["deepspeed"]
    interval = json.loads(os.environ["UPDATE_INTERVAL"])
    values = experiment.deepspeed_config(Configuration(ga=1))
    options = {"topk_ratio": 0.5, "select_strategy": "step", "select_interval": 4, "update_interval": interval}
    values["zero_optimization"]["zenflow"] = options | {"overlap_step": False, "full_warm_up_rounds": 0}
    values["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}  # for ZenFlow's own optimizer on the device
    model = experiment.build_model(Configuration())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=values)
    return answer | {"built": type(zero).__name__, "steps": zero.gradient_accumulation_steps}


def _in_child(entry: Mapping[str, Any], writer: int) -> None:
    os.environ.update(entry["env"])
    sys.path.insert(0, entry["release"])
    answer: dict[str, Any] = {"error": None}
    signal.alarm(SECONDS)  # a run that hangs is killed, and named
    said = sys.stderr = io.StringIO()
    os.chdir(tempfile.mkdtemp(dir=os.environ["TMPDIR"]))
    try:
        answer |= globals()[entry["run"]]()
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["said"] = said.getvalue()
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)


def main() -> None:
    import torch
    import torch.distributed.checkpoint  # DeepSpeed imports it, and it takes long

    torch.set_num_threads(1)
    answers = []
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for entry in json.load(sys.stdin):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _in_child(entry, writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            words = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.append(json.loads(words) if words else {"error": f"the child ended with {code}", "said": ""})
    print(json.dumps(answers), file=out, flush=True)


if __name__ == "__main__":
    main()
