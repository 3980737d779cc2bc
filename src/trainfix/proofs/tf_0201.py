"""Proof of TF-0201: LLaMA-Factory's trainer with a processor, as for every multimodal checkpoint."""

from __future__ import annotations

from . import llamafactory_experiment, token_experiment


def main() -> None:
    packages = ["llamafactory", "transformers"]
    token_experiment.run(lambda: llamafactory_experiment.train(processor=True), packages=packages)
