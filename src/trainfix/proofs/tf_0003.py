"""Proof of TF-0003: of 8 `backward` calls per step, the boundary set by hand, only the last reaches the optimizer."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    experiment.run(drives.by_hand, config={**drives.ZERO_2_OFFLOAD, "gradient_accumulation_steps": 1})
