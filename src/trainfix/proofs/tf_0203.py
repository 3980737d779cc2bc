"""Proof of TF-0203: two ranks of LLaMA-Factory's trainer, each of which averages over its own tokens."""

from __future__ import annotations

from . import llamafactory_experiment, token_experiment


def main() -> None:
    token_experiment.run(llamafactory_experiment.train, packages=["llamafactory", "transformers"], ranks=2)
