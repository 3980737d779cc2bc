"""Two ranks with FSDP2's `fully_shard`, reduced after every micro-batch or after the last one."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.ledger.mutations.loops import data


def train(*, every=True, mixed=False, clip=0.0):
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    how = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    model = data.model()
    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for window in data.windows(rank, ranks):
        tokens = torch.tensor(sum(data.count(batch) for batch in window))
        torch.distributed.all_reduce(tokens)
        for number, batch in enumerate(window):
            model.set_requires_gradient_sync(every or number == len(window) - 1)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            (data.token_losses(logits, batch["labels"]).sum() * ranks / tokens).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
