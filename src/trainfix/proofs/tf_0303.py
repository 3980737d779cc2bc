"""Proof of TF-0303: with label smoothing, TRL's SFTTrainer adds up the means of micro-batches."""

from __future__ import annotations

from . import token_experiment, trl_experiment


def main() -> None:
    token_experiment.run(lambda: trl_experiment.train(steps=8, smoothing=0.1), packages=["trl", "transformers"])
