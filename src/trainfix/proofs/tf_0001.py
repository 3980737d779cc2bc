"""Proof of TF-0001: under ZeRO-2 with CPU offload, the optimizer gets the first and the last micro-batch of eight."""

from __future__ import annotations

from typing import Any

from . import experiment


def drive(engine: Any, loss: experiment.Loss) -> None:
    """The usual loop: `backward` and `step` for every micro-batch; the engine knows where the window ends."""
    for k in range(experiment.MICRO_BATCHES):
        engine.backward(loss(k))
        engine.step()


def main() -> None:
    experiment.run(engine_steps=experiment.MICRO_BATCHES, drive=drive)
