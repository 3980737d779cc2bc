"""Proof of TF-0410: 6 micro-batches an epoch and windows of 4, the second of which crosses the end of the epoch."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(steps=4, rows=6, max_steps=2),
        packages=["transformers", "accelerate"],
    )
