"""Proof of TF-0013: 8 `backward` calls per step, no boundary set, under ZeRO-2 with CPU offload."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    experiment.run(drives.bare, config={**drives.ZERO_2_OFFLOAD, "gradient_accumulation_steps": 1})
