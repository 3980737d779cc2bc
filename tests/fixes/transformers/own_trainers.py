"""Trainers with something of a user's own. Imported in the child, where transformers is there."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from tests.fixes.transformers import own_losses


class OwnStep(Trainer):  # type: ignore[misc]
    """Computes the step itself, and leaves the division to accelerate."""

    training_step = own_losses.training_step


class HandsOn(Trainer):  # type: ignore[misc]
    """Does something before and after the step and the loss."""

    def training_step(self, *args: Any, **named: Any) -> Any:
        return super().training_step(*args, **named)


class OwnSmoother(Trainer):  # type: ignore[misc]
    """With a label smoother of its own: a mean, divided by the steps."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        theirs = self.label_smoother
        self.label_smoother = lambda *rest, **more: theirs(*rest, **more) / self.args.gradient_accumulation_steps


class OwnUse(Trainer):  # type: ignore[misc]
    """Asks transformers' label smoother itself, and divides by the steps."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.label_smoother(outputs, labels, shift_labels=True) / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss
