"""Proof of TF-0401: four micro-batches whose mean losses are averaged."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(steps=4), packages=["transformers", "accelerate"]
    )
