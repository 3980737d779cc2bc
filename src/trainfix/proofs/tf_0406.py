"""Proof of TF-0406: a model that takes no token count, and a last window of half the length."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(steps=4, rows=6, lengths=(8,), takes_count=False, max_steps=2),
        packages=["transformers", "accelerate"],
    )
