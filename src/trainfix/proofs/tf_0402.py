"""Proof of TF-0402: two ranks, each of which averages over its own tokens."""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(lambda: token_experiment.train_with_transformers(steps=4), packages=["transformers"], ranks=2)
