"""Proof of TF-0407: a Llama model, which takes the number of tokens, and micro-batches of very different lengths."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(),
        packages=["transformers", "accelerate"],
    )
