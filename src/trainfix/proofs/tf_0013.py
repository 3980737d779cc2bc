"""Proof of TF-0013: 8 `backward` calls per step, no boundary set, under ZeRO-2 with CPU offload.

Before 0.19.0 the last call wins, as a loop that skips a step may want; that is not this error.
"""

from __future__ import annotations

from . import drives, experiment

LAST = "0" * (experiment.MICRO_BATCHES - 1) + "1"


def main() -> None:
    config = {**drives.ZERO_2_OFFLOAD, "gradient_accumulation_steps": 1}
    experiment.run(drives.bare, config=config, not_this_error=LAST)
