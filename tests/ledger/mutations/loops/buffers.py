"""Accumulation by hand: gradients are summed in buffers of the loop's own."""

from __future__ import annotations

import torch

from tests.ledger.mutations.loops import data


def train():
    model = data.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sums = [torch.zeros_like(one) for one in model.parameters()]
    model.train()
    for window in data.windows():
        tokens = sum(data.count(batch) for batch in window)
        for batch in window:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            (data.token_losses(logits, batch["labels"]).sum() / tokens).backward()
            for own, parameter in zip(sums, model.parameters(), strict=True):
                own += parameter.grad
            optimizer.zero_grad()
        for own, parameter in zip(sums, model.parameters(), strict=True):
            parameter.grad = own.clone()
        optimizer.step()
        optimizer.zero_grad()
        for own in sums:
            own.zero_()
