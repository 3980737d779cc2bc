"""Other people's packages that change transformers too, as `prepare` of a run: called with (trainer, configuration).

What they do to Trainer's class holds for the trainers that are built after it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import textwrap
from functools import wraps
from typing import Any


def liger(trainer: Any, configuration: Any) -> None:
    """Liger-Kernel's own forward and loss for this model, its one kernel by plain torch: Triton has no CPU."""
    patches: Any = importlib.import_module("liger_kernel.transformers")
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = _linear_cross_entropy
    patches._apply_liger_kernel_to_instance(model=trainer.model, rope=False, rms_norm=False, swiglu=False)
    if trainer.model.forward.__module__ != "liger_kernel.transformers.model.llama":
        raise RuntimeError(f"this is not Liger-Kernel's: {trainer.model.forward}")


def _linear_cross_entropy(hidden: Any, weight: Any, labels: Any, *, reduction: str, ignore_index: int, **_: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=ignore_index, reduction=reduction)


def unsloth(trainer: Any, configuration: Any) -> None:
    """What Unsloth does to Trainer whenever it loads a model."""
    os.environ |= {"UNSLOTH_IS_PRESENT": "1", "UNSLOTH_ALLOW_CPU": "1"}  # its code for GPUs, without one
    own: Any = importlib.import_module("unsloth.models._utils")
    own.patch_gradient_accumulation_fix(importlib.import_module("transformers").Trainer)


def unsloth_before_trainfix(trainer: Any, configuration: Any) -> None:
    """The same, and trainfix comes after it."""
    unsloth(trainer, configuration)
    importlib.import_module("trainfix")


def wrap_training_step(trainer: Any, configuration: Any) -> None:
    """Somebody's wrapper that calls what stood there before, and says so."""
    cls: Any = importlib.import_module("transformers").Trainer
    before = cls.training_step

    @wraps(before)
    def training_step(self: Any, *args: Any, **named: Any) -> Any:
        return before(self, *args, **named)

    cls.training_step = training_step


def replace_training_step(trainer: Any, configuration: Any) -> None:
    """Somebody's copy of what Trainer's source says."""
    cls: Any = importlib.import_module("transformers").Trainer
    names = dict(vars(importlib.import_module("transformers.trainer")))
    exec(textwrap.dedent(inspect.getsource(cls.training_step)), names)
    cls.training_step = names["training_step"]
