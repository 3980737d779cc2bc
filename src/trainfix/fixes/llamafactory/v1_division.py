"""LLaMA-Factory's v1 trainer under DeepSpeed: the gradient is divided by the window's tokens alone. Repairs TF-0204.

`BaseTrainer.fit` weighs each micro-batch's loss by its share of the window's tokens, so that the losses add up to the
mean over the window. 0.9.5 brought a DeepSpeed plugin which tells accelerate, and through it DeepSpeed's engine, the
number of micro-batches and calls `accelerator.backward(loss)`: the engine divides by that number once more.

What we do instead is to tell the engine that the loss is divided already, as transformers' Trainer does. Between the
micro-batches of a window nothing of a user's runs, so a repair never comes or goes in the middle of one.

Delete this file when no supported LLaMA-Factory calls `backward` so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from trainfix.engine.contract import Fix, Function, Guard, Target

_ENGINE = "llamafactory.v1.plugins.trainer_plugins.distributed.deepspeed:DeepSpeedEngine."


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once the plugin is imported."""

    @wraps(originals[_ENGINE + "backward"])
    def backward(self: Any, loss: Any) -> None:
        self.accelerator.backward(loss, scale_wrt_gas=False)

    return {_ENGINE + "backward": backward}


def _reached(engine: Any) -> str | None:
    steps = engine.accelerator.gradient_accumulation_steps
    return f"dist_config deepspeed with {steps} micro-batches in a window" if steps > 1 else None


FIX = Fix(
    name="llamafactory.v1_division",
    package="llamafactory",
    advisories=("TF-0204",),
    requires={"llamafactory": ">=0.9.5", "accelerate": ">=1.3", "deepspeed": ">=0.10"},
    targets=(Target(_ENGINE + "backward", frozenset({"9ee7989d3c0f"})),),  # 0.9.5
    relies_on=(Target("llamafactory.v1.core.base_trainer:BaseTrainer.fit", frozenset({"369c6f47e1bd"})),),  # 0.9.5
    guards=(Guard(_ENGINE + "__init__", {"TF-0204": _reached}),),
    build=build,
    repairs=lambda engine: _reached(engine) is not None,
    group=lambda engine: None,
    limits="The first label of a row, which is never trained, is counted where it is not masked.",
)
