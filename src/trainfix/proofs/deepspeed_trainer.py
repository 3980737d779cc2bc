"""Trainers under DeepSpeed, ZeRO stage 1, in one CPU process: for proofs of what the two do together.

The consumed gradient is what the torch optimizer sees when its step begins, one flat copy of all parameters.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from typing import Any

import torch

from . import experiment, token_experiment

ZERO_1 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},
}


def start() -> None:
    """DeepSpeed on its CPU accelerator, in the process group of one rank that a launcher would have announced."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, and not used: there is a store
    experiment.prepare_cpu()
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def watch_steps(optimizer: torch.optim.Optimizer, watch: token_experiment.Watch) -> None:
    """Judge every step of this optimizer, which is to hold the model's parameters in one group."""
    model = watch.model

    def look(stepping: Any, *_: Any) -> None:
        if watch.seen:  # some releases step once while they are built
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
            weights = [parameter.detach().clone() for parameter in model.parameters()]
            watch.judge(experiment.gradient(stepping, weights).double(), state)

    optimizer.register_step_pre_hook(look)


def prove(*, advisory: str, rows: int, max_steps: int, takes_count: bool = True) -> None:
    """Train the tiny model with windows of four micro-batches, and print the worst of them.

    `takes_count`: see token_experiment.train_with_transformers. All micro-batches have as many tokens.
    """
    if importlib.util.find_spec("deepspeed") is None:
        sys.exit(f"{advisory} shows only under DeepSpeed, which is not installed")
    token_experiment.run(
        lambda: _train(rows, max_steps, takes_count), packages=["transformers", "accelerate", "deepspeed"]
    )


def _train(rows: int, max_steps: int, takes_count: bool) -> token_experiment.Watch:
    import transformers

    start()
    model = token_experiment.tiny_llama()
    watch = token_experiment.Watch(model)
    data = token_experiment.answers(rows, lengths=(8,))
    watch.learn(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    watch_steps(optimizer, watch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=max_steps,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            deepspeed=ZERO_1,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=token_experiment.Rows(data),
            data_collator=token_experiment.collate,
        )

        def create_optimizer() -> torch.optim.Optimizer:
            """In one parameter group, which DeepSpeed hands on as one flat copy."""
            trainer.optimizer = optimizer
            return optimizer

        trainer.create_optimizer = create_optimizer
        trainer.model_accepts_loss_kwargs = takes_count and trainer.model_accepts_loss_kwargs
        trainer.train()
    return watch
