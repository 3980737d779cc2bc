"""Proof of TF-0405: label smoothing, with micro-batches of very different lengths."""

from __future__ import annotations

from . import token_experiment

SHARE = 0.1


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(
            losses=token_experiment.smoothed(SHARE), label_smoothing_factor=SHARE
        ),
        packages=["transformers", "accelerate"],
    )
