"""Run LLaMA-Factory's v1 SFTTrainer under DeepSpeed, or without, in one child. Configurations are trainer_runs'.

The trainer, its batch generator and its DeepSpeed plugin are LLaMA-Factory's; the rows and the model are handed to it.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support import trainer_runs
from tests.support.trainer_runs import Configuration, Result

run = functools.partial(trainer_runs.run, program="tests.support.llamafactory_v1_runs")


def perform(values: Mapping[str, Any], result: Result) -> None:
    """Train for two windows, and write `windows` and `logs` into the result."""
    configuration = Configuration(**values)
    if configuration.deepspeed is not None:
        trainer_runs.start_deepspeed()
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("interface", "helper"):  # the group is there already, and there is no device to wait for
        module: Any = importlib.import_module(f"llamafactory.v1.accelerator.{name}")
        module.init_process_group = module.synchronize = lambda *_, **__: None
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    trainers: Any = importlib.import_module("llamafactory.v1.trainers.sft_trainer")
    trainers.DistributedInterface()
    model = tokens.tiny_llama()
    watch = tokens.Watch(model)
    rows = tokens.answers(configuration.rows)
    watch.learn(rows)
    weighted = [{**row, "loss_weights": [float(label != tokens.IGNORED) for label in row["labels"]]} for row in rows]
    with tempfile.TemporaryDirectory(prefix="trainfix-") as folder:
        trainer = trainers.SFTTrainer(
            args=_arguments(configuration, Path(folder)),
            model=model,
            renderer=SimpleNamespace(
                processor=SimpleNamespace(model_input_names=["input_ids", "attention_mask"]),
                process_samples=lambda samples: samples,
            ),
            train_dataset=weighted,
        )
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    plugin = trainer._deepspeed_engine
    engine = None if plugin is None else plugin.accelerator.deepspeed_engine_wrapped.engine
    trainer_runs.judge_steps(optimizer, watch, lambda: SimpleNamespace(deepspeed=engine))
    result["logs"] = []
    handler = trainer.callback_handler
    log = handler.on_log
    handler.on_log = lambda args, state, logs: (
        result["logs"].append({key: float(logs[key]) for key in ("loss", "grad_norm")}),
        log(args, state, logs),
    )
    trainer.fit()
    result["windows"] = watch.windows


def _arguments(configuration: Configuration, folder: Path) -> Any:
    config: Any = importlib.import_module("llamafactory.v1.config.training_args")
    plugins: Any = importlib.import_module("llamafactory.v1.config.arg_utils")
    distributed = None
    if configuration.deepspeed is not None:
        file = folder / "deepspeed.json"
        plain = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
        file.write_text(json.dumps({**trainer_runs.deepspeed_config(configuration.deepspeed), **plain}))
        distributed = plugins.PluginConfig({"name": "deepspeed", "config_file": str(file)})
    return config.TrainingArguments(
        output_dir=str(folder / "out"),
        micro_batch_size=1,
        global_batch_size=configuration.steps,
        max_steps=2,
        learning_rate=1e-3,
        dist_config=distributed,
        cutoff_len=256,
        max_grad_norm=1e9,
        bf16=False,
        batching_workers=0,
    )


if __name__ == "__main__":
    trainer_runs.main(perform)
