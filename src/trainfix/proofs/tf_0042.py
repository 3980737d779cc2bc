"""Proof of TF-0042: a branch that the last micro-batch does not use, under ZeRO-1 with overlap_comm and offload."""

from __future__ import annotations

from . import drives, experiment


def main() -> None:
    stage = {**drives.ZERO_2_OFFLOAD["zero_optimization"], "stage": 1, "overlap_comm": True}
    experiment.run(drives.every, config={"zero_optimization": stage}, mask="11111110")
