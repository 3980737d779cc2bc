"""What the tests of the windows change about a trainer in the child: named in a configuration."""

from __future__ import annotations

import functools
import sys
from types import MethodType
from typing import Any

import transformers


def takes_no_count(trainer: Any, configuration: Any) -> None:
    """As for a model whose forward has no **kwargs; LLaMA-Factory sets it for models with a processor."""
    trainer.model_accepts_loss_kwargs = False


class OwnLoss(transformers.Trainer):  # type: ignore[misc]
    """A user's own loss, twice Trainer's."""

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        return 2 * super().compute_loss(*args, **named)


def own_function(trainer: Any, configuration: Any) -> None:
    """A compute_loss_func, which is the model's own loss."""

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return trainer.model.loss_function(outputs.logits, labels, 64, num_items_in_batch=num_items_in_batch)

    trainer.compute_loss_func = loss


def own_loss_of_the_object(trainer: Any, configuration: Any) -> None:
    """A compute_loss that was set on the trainer itself, twice Trainer's."""
    theirs = type(trainer).compute_loss
    trainer.compute_loss = MethodType(lambda self, *args, **named: 2 * theirs(self, *args, **named), trainer)


def own_forward(trainer: Any, configuration: Any) -> None:
    """A model of the user's own class, which computes its loss itself."""
    theirs = type(trainer.model).forward

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        return theirs(self, *args, **named)

    forward.__module__, forward.__qualname__ = "mine", "Model.forward"
    trainer.model.__class__ = type("Model", (type(trainer.model),), {"forward": forward})


def reverts_in_the_second_window(trainer: Any, configuration: Any) -> None:
    """trainfix.revert() between the second window's micro-batches."""
    trainer.add_callback(_At(steps=1, call="revert"))


def repaired_from_the_second_window_on(trainer: Any, configuration: Any) -> None:
    """Reverted before the training, and trainfix.apply() between the second window's micro-batches."""
    sys.modules["trainfix"].revert()
    trainer.add_callback(_At(steps=1, call="apply"))


def trains_twice(trainer: Any, configuration: Any) -> None:
    """What a training has left over is not part of the next one."""
    train = trainer.train

    def twice() -> Any:
        train()
        trainer.optimizer = trainer.lr_scheduler = None
        return train()

    trainer.train = twice


class _At(transformers.TrainerCallback):  # type: ignore[misc]
    """Calls a function of trainfix once, after the first micro-batch of the window that follows `steps` steps."""

    def __init__(self, *, steps: int, call: str) -> None:
        self.steps, self.call = steps, call

    def on_substep_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == self.steps and self.call:
            getattr(sys.modules["trainfix"], self.call)()
            self.call = ""


def is_untouched(trainer: Any, configuration: Any) -> None:
    """What reads a window and what trains on it are the release's own functions."""
    for name in ("get_batch_samples", "training_step"):
        method = vars(transformers.Trainer)[name]
        assert method.__code__.co_filename == sys.modules["transformers.trainer"].__file__
        assert not hasattr(method, "__wrapped__")
