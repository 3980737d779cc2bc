"""Proof of TF-0409: 14 rows are 7 micro-batches of two, of which the last three are a window of their own."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(steps=4, rows=14, per_device_train_batch_size=2, max_steps=3),
        packages=["transformers", "accelerate"],
    )
