"""Proof of TF-0103: two epochs of six micro-batches, in windows of four."""

from __future__ import annotations

from . import openrlhf_experiment


def main() -> None:
    openrlhf_experiment.run(steps=4, rows=6, epochs=2)
