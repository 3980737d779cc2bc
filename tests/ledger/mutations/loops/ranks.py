"""Two ranks: DistributedDataParallel with and without `no_sync`, or an average that is made by hand."""

from __future__ import annotations

import contextlib

import torch
from torch.distributed import all_reduce
from torch.nn.parallel import DistributedDataParallel

from tests.ledger.mutations.loops import data


def train(*, kind="no_sync", clip=0.0):
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = data.model()
    if kind != "by hand":
        model = DistributedDataParallel(model)
    if kind == "hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model.register_comm_hook(None, allreduce_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for window in data.windows(rank, ranks):
        tokens = torch.tensor(sum(data.count(batch) for batch in window))
        all_reduce(tokens)
        for number, batch in enumerate(window):
            last = number == len(window) - 1
            alone = kind == "no_sync" and not last
            with model.no_sync() if alone else contextlib.nullcontext():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                losses = data.token_losses(logits, batch["labels"])
                (losses.sum() * ranks / tokens).backward()
        if kind == "by hand":
            for one in model.parameters():
                all_reduce(one.grad)
                one.grad /= ranks
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
