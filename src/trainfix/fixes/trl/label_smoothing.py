"""TRL's own use of the label smoother: every trained token of a window counts the same. Repairs TF-0303.

From 1.15.0 on SFTTrainer computes its loss itself, and with `label_smoothing_factor` asks transformers' LabelSmoother,
which up to transformers 5.14.1 takes no count of tokens and returns the mean over a micro-batch. Trainer expects a loss
that has been divided by the tokens of the window, and divides no more: a mean of means, times the accumulation steps,
and times the ranks, by which TRL multiplies a loss that was divided by the tokens of them all. In Trainer's own
`compute_loss` the same is TF-0405. With transformers 5.15.0 and newer TRL hands the count on.

What we do instead is the same: while `SFTTrainer.compute_loss` runs with a count, it finds a smoother that adds up and
divides by that count.

Delete this file when no supported TRL can run with a transformers older than 5.15.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from trainfix.engine.contract import Fix, Function, Guard, Target
from trainfix.fixes.transformers import recognise
from trainfix.fixes.transformers.label_smoothing import counted, smooths
from trainfix.fixes.transformers.mid_window import MidWindow

_TRAINER = "trl.trainer.sft_trainer:SFTTrainer."

_windows = MidWindow("compute_loss", ("trl.trainer.sft_trainer", "SFTTrainer"))


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once TRL's SFTTrainer is imported."""
    compute_loss = originals[_TRAINER + "compute_loss"]
    _windows.begin()

    @wraps(compute_loss)
    def by_token(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is None or not _smooths(self):
            return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        with _windows.micro_batch(self) as ours:
            if not ours:
                return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            with counted(self, num_items_in_batch):
                return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return {_TRAINER + "compute_loss": by_token}


def _smooths(trainer: Any) -> bool:
    """With another loss_type TRL leaves the smoother alone."""
    return smooths(trainer) and trainer.args.loss_type == "nll"


def _reached(trainer: Any) -> str | None:
    steps, ranks = recognise.steps(trainer), recognise.ranks(trainer)
    over_ranks = ranks > 1 and trainer.args.average_tokens_across_devices
    if not _smooths(trainer) or (steps == 1 and not over_ranks):
        return None
    on = f" and tokens counted over {ranks} ranks" if over_ranks else ""
    return f"label_smoothing_factor = {trainer.label_smoother.epsilon}, gradient_accumulation_steps = {steps}{on}"


def _own(trainer: Any) -> str | None:
    """A `compute_loss` in place of TRL's that does not hand on to it."""
    for cls in type(trainer).__mro__:
        own = vars(cls).get("compute_loss")
        if (cls.__module__, cls.__qualname__) == ("trl.trainer.sft_trainer", "SFTTrainer"):
            return None
        if own is not None and "compute_loss" not in getattr(getattr(own, "__code__", None), "co_names", ()):
            return f"own loss: {cls.__module__}.{own.__qualname__}"
    return None


# Shapes of TRL 1.15.0 and 1.16.0.
FIX = Fix(
    name="trl.label_smoothing",
    package="trl",
    advisories=("TF-0303",),
    requires={"trl": ">=1.15.0", "transformers": ">=4.56.2,<5.15.0"},
    targets=(Target(_TRAINER + "compute_loss", frozenset({"fa9885802961"})),),
    relies_on=(Target("transformers.trainer_pt_utils:LabelSmoother.__call__", frozenset({"00f1bc4f52b4"})),),
    guards=(Guard(_TRAINER + "__init__", {"TF-0303": _reached}),),
    build=build,
    repairs=lambda trainer: _reached(trainer) is not None,
    group=lambda trainer: None,
    in_window=_windows.in_window,
    own=_own,
)
