"""Proof of TF-0032: what passes two outputs of one engine forward is divided by the accumulation steps twice."""

from __future__ import annotations

from typing import Any

import torch

from . import experiment


class _Outputs(dict[str, torch.Tensor]):
    """As a model of transformers returns them: one comes from the other, and the gradient passes both."""

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return self["last"].to(dtype)


def drive(engine: Any, loss: experiment.Loss) -> None:
    """The usual loop, with a model that returns two outputs."""
    both = engine.module.register_forward_hook(lambda module, inputs, output: _Outputs(last=output * 1, before=output))
    for k in range(experiment.MICRO_BATCHES):
        engine.backward(loss(k))
        engine.step()
    both.remove()


def main() -> None:
    experiment.run(drive, config={"zero_optimization": {"stage": 1}})
