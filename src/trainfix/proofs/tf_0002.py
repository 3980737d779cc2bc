"""Proof of TF-0002: under ZeRO-2 without offload, the optimizer gets the last micro-batch of eight."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    experiment.run(drives.every, config={"zero_optimization": {"stage": 2}})
