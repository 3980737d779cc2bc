"""Proof of TF-0301: two ranks of TRL's SFTTrainer, each of which averages over its own tokens."""

from __future__ import annotations

from . import token_experiment, trl_experiment


def main() -> None:
    token_experiment.run(lambda: trl_experiment.train(steps=4), packages=["trl", "transformers"], ranks=2)
