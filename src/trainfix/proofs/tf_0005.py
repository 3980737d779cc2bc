"""Proof of TF-0005: a side branch that is unused in the first and last micro-batch, under ZeRO-3 with CPU offload."""

from __future__ import annotations

from . import drives, experiment

# What is prefetched and then not used makes releases before 0.15.3 stop with "still have inflight params".
CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "stage3_prefetch_bucket_size": 0,
    }
}


def main() -> None:
    experiment.run(drives.every, config=CONFIG, mask="01111110")
