"""Proof of TF-0205: LLaMA-Factory's trainer averages the means of micro-batches."""

from __future__ import annotations

from . import llamafactory_experiment, token_experiment


def main() -> None:
    token_experiment.run(llamafactory_experiment.train, packages=["llamafactory", "transformers"])
