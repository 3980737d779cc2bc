"""Proof of TF-0408: a model that takes no token count, and micro-batches of one length."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(lengths=(8,), takes_count=False),
        packages=["transformers", "accelerate"],
    )
