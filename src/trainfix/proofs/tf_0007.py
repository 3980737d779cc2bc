"""Proof of TF-0007: two ranks, bf16 with float32 accumulation: the last of 8 micro-batches is not averaged over them.

The ranks' coefficients are told apart by nothing but their gradients, so what is seen is the relative error: each half
of the gradient holds its own rank's last micro-batch twice and the other's not at all.
"""

from __future__ import annotations

from . import drives, experiment

# The ranks reduce in float32 as well, so that nothing is rounded away between them.
CONFIG = {
    "zero_optimization": {"stage": 1},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


def main() -> None:
    experiment.run(drives.every, config=CONFIG, ranks=2, dtype="bf16")
