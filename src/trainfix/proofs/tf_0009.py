"""Proof of TF-0009: two bf16 micro-batches under ZeRO-2 with CPU offload are added up in bf16."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    experiment.run(drives.every, config=drives.ZERO_2_OFFLOAD, dtype="bf16", micro_batches=2)
