"""The gradient is divided by the accumulation steps once, not twice. Repairs TF-0404.

Since 4.46.2 Trainer itself sees to the division by the window (tokens, or steps), and tells accelerate that a window
has one step (`num_steps` 1), so that `Accelerator.backward` divides by nothing. In 5.2.0, which put Trainer's parts in
a new order, `create_accelerator_and_postprocess` passes on `gradient_accumulation_steps` again (transformers#45305):
without DeepSpeed the optimizer receives 1/steps of the gradient, and the logged norm is that of it, while the logged
loss is taken before. transformers#45349 (5.5.4) goes back to 1.

What we do instead is the same, but only while `Trainer.training_step` runs, which is what has divided already: right
for every loss that passes through it, also a user's own. Accelerate keeps the number of steps for the whole process;
so neither another trainer, nor one built before trainfix came, nor an Accelerator of the user's own is disturbed. Under
DeepSpeed, accelerate does not divide. A `training_step` of the user's own that does not call Trainer's is left alone.

Delete this file when no supported framework can run with transformers 5.2.0 to 5.5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from trainfix.engine.contract import Fix, Function, Guard, Target
from trainfix.fixes.transformers.mid_window import MidWindow

_TRAINER = "transformers.trainer:Trainer."

# What Unsloth leaves on Trainer where its own constructor around Trainer's sets accelerate's steps to 1.
_UNSLOTH = "_unsloth_init_wrapped_for_accelerate_gas"

_windows = MidWindow("training_step")


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once transformers.trainer is imported."""
    training_step = originals[_TRAINER + "training_step"]
    _windows.begin()

    @wraps(training_step)
    def dividing_once(self: Any, *args: Any, **named: Any) -> Any:
        accelerator = self.accelerator
        with _windows.micro_batch(self) as ours:
            steps = accelerator.gradient_accumulation_steps
            if not ours or steps == 1 or self.is_deepspeed_enabled:
                return training_step(self, *args, **named)
            accelerator.gradient_accumulation_steps = 1
            try:
                return training_step(self, *args, **named)
            finally:
                accelerator.gradient_accumulation_steps = steps

    return {_TRAINER + "training_step": dividing_once}


def _own(trainer: Any) -> str | None:
    """A `training_step` in place of Trainer's that does not hand on to it."""
    for cls in type(trainer).__mro__:
        step = vars(cls).get("training_step")
        if (cls.__module__, cls.__qualname__) == ("transformers.trainer", "Trainer"):
            return None
        if step is not None and "training_step" not in getattr(getattr(step, "__code__", None), "co_names", ()):
            return f"own training_step: {cls.__module__}.{cls.__qualname__}"
    return None


def _reached(trainer: Any) -> str | None:
    steps = trainer.accelerator.gradient_accumulation_steps
    if steps == 1 or trainer.is_deepspeed_enabled or hasattr(trainer, _UNSLOTH):
        return None
    return f"gradient_accumulation_steps = {steps}, without DeepSpeed"


# Shapes of 5.2.0 to 5.5.3.
FIX = Fix(
    name="transformers.accelerator_division",
    package="transformers",
    advisories=("TF-0404",),
    requires={"transformers": ">=5.2.0,<5.5.4"},
    targets=(Target(_TRAINER + "training_step", frozenset({"fd8feb27f8a5"})),),
    relies_on=(Target(_TRAINER + "create_accelerator_and_postprocess", frozenset({"0b430f50c70e"})),),
    guards=(Guard(_TRAINER + "__init__", {"TF-0404": _reached}),),
    build=build,
    repairs=lambda trainer: _reached(trainer) is not None,
    group=lambda trainer: None,
    in_window=_windows.in_window,
    own=_own,
    limits="A training_step that does not call Trainer's is left alone, also if it is a copy of it.",
)
