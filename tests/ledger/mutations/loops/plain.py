"""A plain torch loop on one rank, with what people put into one."""

from __future__ import annotations

import contextlib

import torch

from tests.ledger.mutations.loops import data


def train(
    *,
    optimizer="AdamW",
    groups=False,  # weight decay for matrices alone
    clip=0.0,
    clip_value=0.0,
    scaled=False,  # a loss scale that doubles with every window
    overflow=False,  # it begins so large that the first window is skipped
    evaluates=False,
    autocast=False,
    dtype="float32",
    compiled=False,
    frozen=False,
    unused=False,
    packed=False,
    left=False,
    set_to_none=True,
    micro_batches=data.WINDOWS,
    **changes,
):
    model = data.model(**changes).to(getattr(torch, dtype))
    if frozen:
        model.model.layers[0].requires_grad_(False)
    if unused:
        model.spare = torch.nn.Linear(4, 4)
    parameters = [one for one in model.parameters() if one.requires_grad]
    matrices = [one for one in parameters if one.dim() > 1]
    vectors = [one for one in parameters if one.dim() == 1]
    asked = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}] if groups else parameters
    stepper = getattr(torch.optim, optimizer)(asked, lr=1e-2, **({"momentum": 0.9} if optimizer == "SGD" else {}))
    scale = {"init_scale": 2.0**127, "backoff_factor": 2.0**-117} if overflow else {"init_scale": 2.0**10}
    scaler = torch.amp.GradScaler("cpu", growth_interval=1, enabled=scaled, **scale)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    model.train()
    for window in data.windows(packed=packed, left=left, sizes=micro_batches):
        tokens = sum(data.count(batch) for batch in window)
        for batch in window:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                logits = call(**inputs).logits
            losses = data.token_losses(logits, batch["labels"])
            loss = losses.sum() / tokens
            scaler.scale(loss).backward()
            if evaluates:
                evaluate(model, batch)
        if clip:
            scaler.unscale_(stepper)
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        if clip_value:
            torch.nn.utils.clip_grad_value_(parameters, clip_value)
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad(set_to_none=set_to_none)


def evaluate(model, batch):
    """As some do it: with gradients, that are thrown away, and without."""
    model.eval()
    model(**batch)
    with torch.no_grad():
        model(**batch)
    model.train()
