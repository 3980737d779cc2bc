"""Proof of TF-0001: under ZeRO-2 with CPU offload, the optimizer gets the first and the last micro-batch of eight."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    experiment.run(drives.every, config=drives.ZERO_2_OFFLOAD)
