"""Proof of TF-0302: TRL's SFTTrainer averages the means of micro-batches."""

from __future__ import annotations

from . import token_experiment, trl_experiment


def main() -> None:
    token_experiment.run(lambda: trl_experiment.train(steps=8), packages=["trl", "transformers"])
