"""Save and load checkpoints with real releases, in one child process: the child's side of test_stamp.

With tests.support.experiment each entry of the list is one run: {"configuration": ..., "do": [["save", FOLDER, TAG],
["load", FOLDER, TAG], ["revert", ID]]}, with DeepSpeed's engine, its loss put together as "call" says where that is
given, or, where "accelerate" is true, with an Accelerator around it. With tests.support.trainer_runs, `prepare` lets a
Trainer go on from its arguments' resume_from_checkpoint, and `prepare_bare` takes the stamps out of that first.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.fixes.deepspeed.scenarios import Composed
from tests.support import experiment


class Said(logging.Handler):
    """What trainfix says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("trainfix")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        if "trainfix" in sys.modules:  # it warns once per process, and here are many runs in one
            importlib.import_module("trainfix.engine.lifecycle")._stamps._told = False

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def perform(deepspeed: ModuleType, values: Mapping[str, Any], result: dict[str, Any]) -> None:
    """One engine, one window, and then what `do` says."""
    said = Said()
    if values.get("accelerate"):
        saver = _accelerator(deepspeed)
    else:
        configuration = experiment.Configuration(**values.get("configuration", {}))
        call = values.get("call")
        trial = Composed(deepspeed, configuration, call) if call else experiment.Trial(deepspeed, configuration)
        trial.window()
        saver = trial.engine
    for action, *arguments in values["do"]:
        if action == "revert":
            importlib.import_module("trainfix").revert(*arguments)
        elif values.get("accelerate"):
            getattr(saver, f"{action}_state")(*arguments)
        else:
            getattr(saver, f"{action}_checkpoint")(*arguments)
    result["said"] = said.lines
    methods = vars(importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine)
    result["wrapped"] = [hasattr(methods[name], "__wrapped__") for name in ("save_checkpoint", "load_checkpoint")]


def _accelerator(deepspeed: ModuleType) -> Any:
    """accelerate's, around an engine with four accumulation steps that has taken one micro-batch."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate: Any = importlib.import_module("accelerate")
    torch: Any = importlib.import_module("torch")
    state: Any = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    config = experiment.deepspeed_config(experiment.Configuration(stage=1, offload=False))
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=config)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, deepspeed_plugin=plugin)
    model = torch.nn.Linear(4, 4)
    rows = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=config["train_micro_batch_size_per_gpu"])
    model, _, rows = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), rows)
    accelerator.backward(model(next(iter(rows))).sum())
    return accelerator


def prepare(trainer: Any, configuration: Any) -> None:
    """Note what trainfix says in the run's folder, and save the model at the end."""
    said = Said()
    train = functools.partial(trainer.train, resume_from_checkpoint=trainer.args.resume_from_checkpoint)

    def noted() -> None:
        train()
        trainer.save_model(str(Path(trainer.args.output_dir, "model")))
        if os.environ.get("RANK", "0") == "0":
            Path(trainer.args.output_dir, "said").write_text("\n".join(said.lines))

    trainer.train = noted


def prepare_bare(trainer: Any, configuration: Any) -> None:
    """The same, from a checkpoint that was saved without stamps."""
    for stamp in Path(trainer.args.resume_from_checkpoint).rglob("trainfix.json"):
        stamp.unlink()
    prepare(trainer, configuration)


if __name__ == "__main__":
    experiment.main(perform)
