"""Proof of TF-0202: LLaMA-Factory's trainer with use_asft_loss, each token's loss weighted by its own likelihood."""

from __future__ import annotations

from typing import Any

import torch

from . import llamafactory_experiment, token_experiment


def _weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = token_experiment.cross_entropy(logits, labels)
    return losses * torch.exp(-losses).detach()


def main() -> None:
    asft: dict[str, Any] = {
        "use_asft_loss": True,
        "asft_alpha": 0.0,
    }  # without the part that holds the model to what it was
    packages = ["llamafactory", "transformers"]
    token_experiment.run(lambda: llamafactory_experiment.train(losses=_weighted, **asft), packages=packages)
