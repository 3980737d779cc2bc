"""Proof of TF-0404: eight micro-batches without DeepSpeed, which Trainer divides and accelerate divides again."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(token_experiment.train_with_transformers, packages=["transformers", "accelerate"])
