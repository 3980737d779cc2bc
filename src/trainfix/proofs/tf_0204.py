"""Proof of TF-0204: LLaMA-Factory's v1 trainer under DeepSpeed, two windows of four micro-batches."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import deepspeed_trainer, token_experiment

STEPS, WINDOWS = 4, 2


def main() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        sys.exit("TF-0204 shows only under DeepSpeed, which is not installed")
    token_experiment.run(_train, packages=["llamafactory", "transformers", "accelerate", "deepspeed"])


def _train() -> token_experiment.Watch:
    deepspeed_trainer.start()
    for name in ("interface", "helper"):  # the process group is there already, and no device to wait for
        accelerator: Any = importlib.import_module(f"llamafactory.v1.accelerator.{name}")
        accelerator.init_process_group = accelerator.synchronize = lambda *_, **__: None
    trainers: Any = importlib.import_module("llamafactory.v1.trainers.sft_trainer")
    trainers.DistributedInterface()
    model = token_experiment.tiny_llama()
    watch = token_experiment.Watch(model)
    rows = token_experiment.answers(STEPS * WINDOWS)
    watch.learn(rows)
    ignored = token_experiment.IGNORED
    weighted = [{**row, "loss_weights": [float(label != ignored) for label in row["labels"]]} for row in rows]
    processor = SimpleNamespace(model_input_names=["input_ids", "attention_mask"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainers.SFTTrainer(
            args=_arguments(Path(folder)),
            model=model,
            renderer=SimpleNamespace(processor=processor, process_samples=lambda samples: samples),
            train_dataset=weighted,
        )
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's, DeepSpeed's, torch's
            optimizer = optimizer.optimizer
        deepspeed_trainer.watch_steps(optimizer, watch)
        trainer.fit()
    return watch


def _arguments(folder: Path) -> Any:
    settings: Any = importlib.import_module("llamafactory.v1.config.training_args")
    plugins: Any = importlib.import_module("llamafactory.v1.config.arg_utils")
    file = folder / "deepspeed.json"
    plain = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    file.write_text(json.dumps({**deepspeed_trainer.ZERO_1, **plain}))
    return settings.TrainingArguments(
        output_dir=str(folder / "out"),
        micro_batch_size=1,
        global_batch_size=STEPS,
        max_steps=WINDOWS,
        learning_rate=1e-3,
        dist_config=plugins.PluginConfig({"name": "deepspeed", "config_file": str(file)}),
        cutoff_len=256,
        bf16=False,
        batching_workers=0,
    )
