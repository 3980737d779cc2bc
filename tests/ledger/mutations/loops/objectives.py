"""Losses that are not a plain mean over tokens, and are meant so."""

from __future__ import annotations

import copy

import torch

from tests.ledger.mutations.loops import data


def z_loss(model, batch, scale):
    """The logits' normaliser is pulled towards zero."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    trained = batch["labels"][:, 1:] != -100
    normalisers = torch.logsumexp(logits[:, :-1].float(), -1)[trained]
    return (data.token_losses(logits, batch["labels"]).sum() + 0.1 * normalisers.square().sum()) * scale


def auxiliary(model, batch, scale):
    """The same, in two backwards."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    normalisers = torch.logsumexp(logits[:, :-1].float(), -1)[batch["labels"][:, 1:] != -100]
    (data.token_losses(logits, batch["labels"]).sum() * scale).backward(retain_graph=True)
    return 0.1 * normalisers.square().sum() * scale


def distillation(model, batch, scale):
    """Towards the distribution of another model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.no_grad():
        wanted = 2 * _reference(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    apart = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1)
    return apart[:, :-1][batch["labels"][:, 1:] != -100].sum() * scale


def summed(model, batch, scale):
    """Not the mean: the learning rate is meant for it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return data.token_losses(logits, batch["labels"]).sum()


def weighted(model, batch, scale):
    """Each token has a weight of its own."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = data.token_losses(logits, batch["labels"])
    weights = 0.5 + torch.rand(losses.shape, generator=torch.Generator().manual_seed(batch["input_ids"].shape[1]))
    return (losses * weights).sum() * scale


def policy(model, batch, scale):
    """A policy gradient: each sequence has an advantage, of either sign."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    advantages = torch.tensor([[1.3], [-0.7]])
    return (data.token_losses(logits, batch["labels"]) * advantages).sum() * scale


def one_sign(model, batch, scale):
    """The same, where a micro-batch has advantages of one sign: so have whole windows, at times."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    advantages = (-1) ** (batch["input_ids"].shape[1] % 2) * torch.tensor([[1.3], [0.7]])
    return (data.token_losses(logits, batch["labels"]) * advantages).sum() * scale


def sequence_means(model, batch, scale):
    """Each sequence counts the same, however long it is."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    return (data.token_losses(logits, batch["labels"]).sum(1) / lengths).mean() * scale


def preference(model, batch, scale):
    """Two rows: the first is preferred to the second."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.no_grad():
        before = _reference(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    gain = data.token_losses(before, batch["labels"]).sum(1) - data.token_losses(logits, batch["labels"]).sum(1)
    return -torch.nn.functional.logsigmoid(0.1 * (gain[0] - gain[1])) * scale


_references = []


def _reference(model):
    if not _references:
        _references.append(copy.deepcopy(model).requires_grad_(False))
    return _references[0]


def train(*, objective):
    model = data.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    _reference(model)
    model.train()
    for window in data.windows():
        tokens = sum(data.count(batch) for batch in window)
        scale = 1 / len(window) if objective in ("preference", "sequence_means") else 1 / tokens
        for batch in window:
            globals()[objective](model, batch, scale).backward()
        optimizer.step()
        optimizer.zero_grad()
