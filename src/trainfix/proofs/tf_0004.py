"""Proof of TF-0004: a side branch that is unused in the first and last micro-batch, under ZeRO-2 with CPU offload."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    experiment.run(drives.every, config=drives.ZERO_2_OFFLOAD, mask="01111110")
