"""What a test changes about a trainer before it trains: called in the child with (trainer, configuration)."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any


def import_trainfix(trainer: Any, configuration: Any) -> None:
    importlib.import_module("trainfix")


def revert_and_apply(trainer: Any, configuration: Any) -> None:
    """`trainfix.revert` in the middle of the second window, `trainfix.apply` in the middle of the fourth."""
    from transformers import TrainerCallback

    import trainfix

    class Change(TrainerCallback):  # type: ignore[misc]
        done = 0

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and self.done == 0:
                trainfix.revert("TF-0404", "TF-0405")
                self.done = 1
            if state.global_step == 3 and self.done == 1:
                trainfix.apply("TF-0404", "TF-0405")
                self.done = 2

    trainer.add_callback(Change())


def another_accelerator(trainer: Any, configuration: Any) -> None:
    """An Accelerator of the user's own, which keeps its number of steps in the same place as Trainer's does."""
    from accelerate import Accelerator
    from transformers import TrainerCallback

    own = Accelerator(gradient_accumulation_steps=5, cpu=True)

    class Check(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, *_: Any, **__: Any) -> None:
            assert own.gradient_accumulation_steps == 5

    trainer.add_callback(Check())


def is_untouched(trainer: Any, configuration: Any) -> None:
    """Nothing of Trainer's or of the label smoother's has been replaced or wrapped: the very functions are there that
    the file makes."""
    from transformers import Trainer
    from transformers.trainer_pt_utils import LabelSmoother

    for cls, names in ((Trainer, ("__init__", "training_step", "compute_loss")), (LabelSmoother, ("__call__",))):
        for name in names:
            function = vars(cls)[name]
            assert type(function) is types.FunctionType, name
            assert function.__code__.co_filename == inspect.getsourcefile(cls), name
            assert hasattr(function, "__wrapped__") == (name == "__init__" and _is_decorated(cls)), name


def _is_decorated(cls: Any) -> bool:
    return inspect.getsource(cls.__init__).lstrip().startswith("@")
