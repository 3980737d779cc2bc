"""A loop that leaves accumulation to accelerate, on one rank or two."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from tests.ledger.mutations.loops import data

STEPS = 3


def train(*, clip=0.0, epochs=1, sizes=data.WINDOWS):
    accelerator = Accelerator(gradient_accumulation_steps=STEPS, cpu=True)
    model = data.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    alone = accelerator.num_processes == 1
    # The end of accelerate's own loader ends a partial window; two ranks have their rows here without one.
    own = data.windows(accelerator.process_index, accelerator.num_processes, sizes=sizes if alone else (STEPS,) * 3)
    loader = [
        {**batch, "tokens": tokens}
        for window in own
        for tokens in [_over_ranks(sum(data.count(one) for one in window))]
        for batch in window
    ]
    model, optimizer = accelerator.prepare(model, optimizer)
    if alone:
        loader = accelerator.prepare(torch.utils.data.DataLoader(loader, batch_size=None))
    model.train()
    for batch in (one for _ in range(epochs) for one in loader):
        with accelerator.accumulate(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = data.token_losses(logits, batch["labels"]).sum() / batch["tokens"]
            # accelerate divides by its steps, and the ranks are averaged
            accelerator.backward(loss * STEPS * accelerator.num_processes)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def _over_ranks(count):
    total = torch.tensor(count)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return int(total)
