"""What divides a loss by the accumulation steps, in which release, and how to get past it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from trainfix.engine.replace import live_shape
from trainfix.fixes.transformers.recognise import own_computation, steps, uses_deepspeed

TRAINER = "transformers.trainer:Trainer."

# What `training_step` divides a loss by, before it hands it to accelerate: shape -> in which case by the steps.
DIVIDES = {
    "a3eb4d9617fe": "multiplies",  # 4.46.1, because accelerate divides by them
    "489a17b67640": "never",  # 4.46.2, 4.46.3, 4.47.1
    "1becf95bf714": "never",  # 4.47.0
    "9cc093595426": "no count",  # 4.48.0
    "13d3847e9107": "no kwargs",  # 4.48.1 to 4.48.3
    "48afef0a9fe3": "no kwargs",  # 4.49.0
    "a218e0f51e42": "no kwargs",  # 4.50.0 to 4.51.3
    "4f847ded368d": "no kwargs",  # 4.52.1 to 4.52.4
    "2597f11e27df": "no count or no kwargs",  # 4.53.0 to 4.54.1
}
_SINCE = (
    ("a3eb4d9617fe", "0"),
    ("489a17b67640", "4.46.2"),
    ("1becf95bf714", "4.47.0"),
    ("489a17b67640", "4.47.1"),
    ("9cc093595426", "4.48.0"),
    ("13d3847e9107", "4.48.1"),
    ("48afef0a9fe3", "4.49.0"),
)
_ENGINE_DIVIDES = {"a3eb4d9617fe", "489a17b67640", "1becf95bf714", "9cc093595426", "13d3847e9107"}
_MULTIPLIES = {"a3eb4d9617fe"}
COUNT_IS_LOST = {"1becf95bf714", "9cc093595426"}


@dataclass
class Sent:
    """A micro-batch's loss on its way to `backward`: what it has been divided by and what it must be multiplied with,
    and what became of it."""

    weight: tuple[Any, Any] | None
    divisor: float
    loss: Any = None


@contextmanager
def backward_undivided(trainer: Any, sent: Sent) -> Iterator[None]:
    """While this is open, the trainer's accelerator and its backend divide no loss, and it is weighed before."""
    import torch

    accelerator = trainer.accelerator
    backward, before = accelerator.backward, vars(accelerator).get("backward")

    def undivided(loss: Any, **named: Any) -> Any:
        if sent.weight is not None:
            tokens, weight = sent.weight
            weighed = loss * (sent.divisor * weight)
            loss = torch.where(tokens.to(loss.device) > 0, weighed, torch.zeros_like(weighed))
            sent.loss = loss.detach()
        if uses_deepspeed(trainer):
            return backward(loss, **{**named, "scale_wrt_gas": False})
        return backward(loss * accelerator.gradient_accumulation_steps, **named)

    accelerator.backward = undivided
    try:
        yield
    finally:
        if before is None:
            del accelerator.backward
        else:
            accelerator.backward = before


def divisor(trainer: Any, shape: str | None, count: Any) -> float:
    """What `training_step` divides the loss by."""
    when = DIVIDES.get(shape or "", "never")
    no_kwargs = not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None
    no_count = count is None and trainer.compute_loss_func is None
    if when == "multiplies":
        return 1 / steps(trainer)
    divides = {
        "never": False,
        "no count": count is None,
        "no kwargs": no_kwargs,
        "no count or no kwargs": no_count or no_kwargs,
    }[when]
    return steps(trainer) if divides else 1


def right_already(trainer: Any, shape: str | None, count: Any, handed_on: bool, own: str | None) -> bool:
    """Whether the loss that goes to `backward` needs no division: `training_step` or the count has done it."""
    if shape not in _ENGINE_DIVIDES or steps(trainer) == 1:
        return False
    if divisor(trainer, shape, count) > 1:
        return True
    counted = count is not None and (handed_on or shape not in COUNT_IS_LOST) and shape not in _MULTIPLIES
    if not counted or not trainer.model_accepts_loss_kwargs:
        return False
    return own is None if trainer.label_smoother is None else _smooths_by_token(trainer)


def _smooths_by_token(trainer: Any) -> bool:
    """Whether the repair of TF-0405 is in place, and looks after this trainer."""
    repair: Any = sys.modules.get("trainfix.fixes.transformers.label_smoothing")
    if repair is None or own_computation(trainer) is not None:
        return False
    live = sys.modules["transformers.trainer"].Trainer.compute_loss
    return bool(live.__code__.co_filename == repair.__file__ and repair.smooths(trainer))


def shape_of_release() -> str:
    """The shape of `training_step`, or, where its body is unknown, the one that its release has."""
    shape = live_shape(TRAINER + "training_step")
    if shape in DIVIDES:
        return shape
    installed = Version(sys.modules["transformers"].__version__)
    return [known for known, since in _SINCE if Version(since) <= installed][-1]
