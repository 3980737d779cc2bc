"""Several optimizers: of one model, or of two that train against each other."""

from __future__ import annotations

import torch

from tests.ledger.mutations.loops import data


def train(*, kind):
    {"one model": one_model, "two models": two_models}[kind]()


def one_model():
    """Matrices by one optimizer, the rest by another."""
    model = data.model()
    parameters = list(model.parameters())
    matrices = torch.optim.SGD([one for one in parameters if one.dim() > 1], lr=1e-2, momentum=0.9)
    rest = torch.optim.AdamW([one for one in parameters if one.dim() == 1], lr=1e-2)
    model.train()
    for window in data.windows():
        tokens = sum(data.count(batch) for batch in window)
        for batch in window:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            (data.token_losses(logits, batch["labels"]).sum() / tokens).backward()
        matrices.step()
        rest.step()
        matrices.zero_grad()
        rest.zero_grad()


def two_models():
    """A generator, and a critic that tells its outputs from real ones."""
    torch.manual_seed(0)
    generator = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12))
    critic = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    makes = torch.optim.Adam(generator.parameters(), lr=1e-3)
    tells = torch.optim.Adam(critic.parameters(), lr=1e-3)
    judge = torch.nn.functional.binary_cross_entropy_with_logits
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        tells.zero_grad()
        real, noise = torch.randn(6, 12, generator=draw) + 1, torch.randn(6, 8, generator=draw)
        judge(critic(real), torch.ones(6, 1)).backward()
        judge(critic(generator(noise).detach()), torch.zeros(6, 1)).backward()
        tells.step()
        makes.zero_grad()
        judge(critic(generator(noise)), torch.ones(6, 1)).backward()
        makes.step()
