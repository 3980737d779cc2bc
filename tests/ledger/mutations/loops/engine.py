"""A loop of one's own around DeepSpeed's engine."""

from __future__ import annotations

import importlib

import torch

from tests.ledger.mutations.loops import data
from tests.support import trainer_runs

STEPS = 3


def train(*, stage=2, offload=False, clip=0.0, fp16=False):
    trainer_runs.start_deepspeed()
    deepspeed = importlib.import_module("deepspeed")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = data.model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    config = trainer_runs.deepspeed_config({"stage": stage, "offload": offload, "gradient_clipping": clip}) | {
        "train_micro_batch_size_per_gpu": data.ROWS,
        "gradient_accumulation_steps": STEPS,
        "train_batch_size": data.ROWS * STEPS * ranks,
        "steps_per_print": 10**9,
        # dynamic: grows with every window
        **({"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1}} if fp16 else {}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for window in data.windows(rank, ranks, sizes=(STEPS,) * 3):
        tokens = torch.tensor(sum(data.count(batch) for batch in window))
        torch.distributed.all_reduce(tokens)
        for batch in window:
            logits = engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = data.token_losses(logits, batch["labels"]).sum() * ranks / tokens
            engine.backward(loss * STEPS)  # the engine divides by its steps
            engine.step()
