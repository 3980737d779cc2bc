"""Proof of TF-0008: `backward(scale_wrt_gas=False)` with a loss that the caller has divided is divided again."""

from __future__ import annotations

from typing import Any

from . import experiment


def drive(engine: Any, loss: experiment.Loss) -> None:
    """The usual loop, as transformers' Trainer runs it."""
    for k in range(experiment.MICRO_BATCHES):
        engine.backward(loss(k) / experiment.MICRO_BATCHES, scale_wrt_gas=False)
        engine.step()


def main() -> None:
    experiment.run(drive, config={"zero_optimization": {"stage": 1}})
