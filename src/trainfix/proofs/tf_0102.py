"""Proof of TF-0102: a window of eight micro-steps, each averaged over its own tokens."""

from __future__ import annotations

from . import openrlhf_experiment


def main() -> None:
    openrlhf_experiment.run()
