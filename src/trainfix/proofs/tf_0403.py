"""Proof of TF-0403: two windows of four micro-batches under DeepSpeed."""

from __future__ import annotations

import importlib.metadata

from . import deepspeed_trainer


def main() -> None:
    takes_count = importlib.metadata.version("transformers") != "4.48.0"  # there only the others are divided twice
    deepspeed_trainer.prove(advisory="TF-0403", rows=8, max_steps=2, takes_count=takes_count)
