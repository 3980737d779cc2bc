"""Run a training loop of one's own with accelerate and DeepSpeed in one child process, as its users write it.

From a test: ``run(stack(accelerate="1.7.0", deepspeed="0.16.9"), [{"steps": 4, "rows": 6}], trainfix=False)``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Mapping
from typing import Any

from tests.support import trainer_runs
from tests.support.trainer_runs import Configuration, Result

run = functools.partial(trainer_runs.run, program="tests.support.accelerate_runs")
"""`trainer_runs.run` with a plain loop. `arguments`: ``{"accumulate": False}`` leaves accumulation to DeepSpeed alone,
``{"revert_at": n}`` and ``{"apply_at": n}`` call trainfix before the n-th micro-batch."""

# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.


class _Run:
    """What `trainer_runs.judge_steps` asks a trainer for."""

    def __init__(self, engine: Any) -> None:
        self.deepspeed = engine


def perform(values: Mapping[str, Any], result: Result) -> None:
    """Train, and write into the result: `windows` (see Watch), one for each step of the optimizer; `ends`: after how
    many micro-batches accelerate said that a window ends; `steps`: after how many the optimizer stepped."""
    import torch

    configuration = Configuration(**values)
    options = {"accumulate": True, **configuration.arguments}
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    trainer_runs.start_deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import accelerate
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    result["release"] = accelerate.__version__
    model = tokens.tiny_llama(**configuration.model)
    rows = tokens.answers(configuration.rows, lengths=configuration.lengths or (5,))
    watch = tokens.Watch(model)
    watch.learn(rows)
    loader: Any = torch.utils.data.DataLoader(
        rows, batch_size=configuration.rows_per_batch, collate_fn=tokens.collate, shuffle=False
    )
    ds_config = trainer_runs.deepspeed_config(configuration.deepspeed or {})
    ds_config["gradient_accumulation_steps"] = configuration.steps
    ds_config.setdefault("gradient_clipping", 0.0)
    plugin = DeepSpeedPlugin(hf_ds_config=ds_config)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier configuration's
    GradientState._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=configuration.steps, deepspeed_plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run: list[Any] = []
    trainer_runs.judge_steps(optimizer, watch, lambda: run[0] if run else None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run.append(_Run(model))
    result |= {"ends": [], "steps": []}
    number = 0
    for _ in range(int(configuration.epochs)):
        for batch in loader:
            for name in ("revert", "apply"):
                if options.get(f"{name}_at") == number:
                    getattr(importlib.import_module("trainfix"), name)("TF-0501")
            number += 1
            before = len(watch.windows)
            with accelerator.accumulate(model) if options["accumulate"] else contextlib.nullcontext():
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if options["accumulate"] and accelerator.sync_gradients:
                result["ends"].append(number)
            result["steps"] += [number] * (len(watch.windows) - before)
    result["windows"] = watch.windows
    result["left_over"] = len(watch.seen)
    result["kept"] = "backward" in vars(accelerator.deepspeed_engine_wrapped)
    accelerator.free_memory()


if __name__ == "__main__":
    trainer_runs.main(perform)
