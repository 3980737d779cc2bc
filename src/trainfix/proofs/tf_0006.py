"""Proof of TF-0006: under ZeRO-1 in bf16 with fp32 sums and CPU offload, each of two ranks keeps its own gradient."""

from __future__ import annotations

from . import drives, experiment

CONFIG = {
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}


def main() -> None:
    # The sum is rounded to bf16 when it is reduced between the ranks.
    experiment.run(drives.every, config=CONFIG, ranks=2, dtype="bf16", tolerance=2e-2)
