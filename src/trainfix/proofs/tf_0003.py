"""Proof of TF-0003: of 8 `backward` calls per step, the boundary set by hand, only the last reaches the optimizer."""

from __future__ import annotations

from typing import Any

from . import experiment


def drive(engine: Any, loss: experiment.Loss) -> None:
    """The loop of a framework that accumulates by itself: it divides the loss and says which `backward` is the last."""
    for k in range(experiment.MICRO_BATCHES):
        engine.set_gradient_accumulation_boundary(k == experiment.MICRO_BATCHES - 1)
        engine.backward(loss(k) / experiment.MICRO_BATCHES)
    engine.step()


def main() -> None:
    experiment.run(engine_steps=1, drive=drive)
