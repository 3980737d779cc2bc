"""The training loops and configurations that several proofs use."""

from __future__ import annotations

from typing import Any

from . import experiment

ZERO_2_OFFLOAD: dict[str, Any] = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
}


def every(engine: Any, loss: experiment.Loss) -> None:
    """The usual loop: `backward` and `step` for every micro-batch; the engine knows where the window ends."""
    for k in range(engine.gradient_accumulation_steps()):
        engine.backward(loss(k))
        engine.step()


def by_hand(engine: Any, loss: experiment.Loss) -> None:
    """The loop of a framework that accumulates by itself: it divides the loss and says which `backward` is the last."""
    for k in range(experiment.MICRO_BATCHES):
        engine.set_gradient_accumulation_boundary(k == experiment.MICRO_BATCHES - 1)
        engine.backward(loss(k) / experiment.MICRO_BATCHES)
    engine.step()


def bare(engine: Any, loss: experiment.Loss) -> None:
    """The same without a word about boundaries: the engine takes every `backward` for the last."""
    for k in range(experiment.MICRO_BATCHES):
        engine.backward(loss(k) / experiment.MICRO_BATCHES)
    engine.step()
