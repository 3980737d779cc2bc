"""With label smoothing, too, every trained token of a window counts the same. Repairs TF-0405.

transformers' LabelSmoother returns the mean over a micro-batch. transformers#34198 (4.46.0) counts the tokens of the
whole window, expects a loss that has been divided by them, and no longer divides it by the accumulation steps; the
smoother was forgotten (transformers#46731): a mean of means, times the accumulation steps, and times the ranks where
tokens are counted over them. transformers#47261 (5.15.0) hands the count to the smoother.

What we do instead is the same: while `compute_loss` runs with a count that Trainer trusts the loss to use (the model
takes it), it finds a smoother that adds up and divides by that count; a window without trained tokens gives zero. It
is transformers' own smoother that is replaced, whatever the model: the labels that it sees are those that were counted.
Whoever computes a loss otherwise, or smooths otherwise, is left alone. 4.47.0 and 4.48.0 hand nobody the count; there
we find it in the micro-batch, where the repair of TF-0407 puts it.

Delete this file when no supported framework can run with transformers 4.46.0 to 5.14.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Function, Guard, Target
from trainfix.fixes.transformers import recognise
from trainfix.fixes.transformers.mid_window import MidWindow

_TRAINER = "transformers.trainer:Trainer."

_windows = MidWindow("compute_loss")
_owners: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()  # trainer -> why it is left alone, or None


class TokenSmoother:
    """Stands for a LabelSmoother: (the sum of the smoothed losses of a micro-batch's trained tokens) / `tokens`."""

    def __init__(self, smoother: Any, tokens: Any) -> None:
        self.smoother, self.tokens = smoother, tokens

    def __call__(self, model_output: Any, labels: Any, shift_labels: bool = False) -> Any:
        import torch

        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        losses = -torch.log_softmax(logits, dim=-1)
        if labels.dim() == losses.dim() - 1:
            labels = labels.unsqueeze(-1)
        ignored = labels.eq(self.smoother.ignore_index)
        of_label = losses.gather(dim=-1, index=labels.clamp(min=0)).masked_fill(ignored, 0.0)
        of_all = losses.sum(dim=-1, keepdim=True, dtype=torch.float32).masked_fill(ignored, 0.0)
        share = self.smoother.epsilon
        summed = (1 - share) * of_label.sum(dtype=torch.float32) + share * of_all.sum() / losses.shape[-1]
        if torch.is_tensor(self.tokens):
            return summed / self.tokens.to(summed.device).clamp(min=1)
        return summed / max(self.tokens, 1)


@contextmanager
def counted(trainer: Any, tokens: Any) -> Iterator[None]:
    """Let `trainer` find a smoother that divides by `tokens`."""
    smoother = trainer.label_smoother
    trainer.label_smoother = TokenSmoother(smoother, tokens)
    try:
        yield
    finally:
        trainer.label_smoother = smoother


def smooths(trainer: Any) -> bool:
    """Whether the loss is smoothed by transformers, and Trainer trusts it to be divided by the window's tokens."""
    kind = type(getattr(trainer, "label_smoother", None))
    theirs = (kind.__module__, kind.__qualname__) == ("transformers.trainer_pt_utils", "LabelSmoother")
    return theirs and trainer.compute_loss_func is None and bool(trainer.model_accepts_loss_kwargs)


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once transformers.trainer is imported."""
    compute_loss = originals[_TRAINER + "compute_loss"]
    _windows.begin()
    _owners.clear()

    @wraps(compute_loss)
    def by_token(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def compute() -> Any:
            return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

        tokens = inputs.get("num_items_in_batch") if num_items_in_batch is None else num_items_in_batch
        if tokens is None or not _is_known(self):
            return compute()
        with _windows.micro_batch(self) as ours:
            if not ours:
                return compute()
            with counted(self, tokens):
                return compute()

    return {_TRAINER + "compute_loss": by_token}


def _is_known(trainer: Any) -> bool:
    if recognise.steps(trainer) == recognise.ranks(trainer) == 1:
        return False  # the mean over the micro-batch is the mean over the window
    if trainer not in _owners:
        _owners[trainer] = recognise.own_computation(trainer) or recognise.uncovered(trainer)
    return smooths(trainer) and _owners[trainer] is None


def _own(trainer: Any) -> str | None:
    if getattr(trainer, "label_smoother", None) is None:
        return None
    return recognise.own_computation(trainer)


def _repairs(trainer: Any) -> bool:
    return _reached(trainer) is not None and recognise.uncovered(trainer) is None


def _reached(trainer: Any) -> str | None:
    if not smooths(trainer):
        return None
    steps, ranks = recognise.steps(trainer), recognise.ranks(trainer)
    over_ranks = ranks > 1 and getattr(trainer.args, "average_tokens_across_devices", False)  # since 4.46.2
    if steps == 1 and not over_ranks:
        return None
    on = f" and tokens counted over {ranks} ranks" if over_ranks else ""
    return f"label_smoothing_factor = {trainer.label_smoother.epsilon}, gradient_accumulation_steps = {steps}{on}"


# Shapes of the releases 4.46.0 to 5.14.1; the comment is the first release that has each.
FIX = Fix(
    name="transformers.label_smoothing",
    package="transformers",
    advisories=("TF-0405",),
    requires={"transformers": ">=4.46.0,<5.15.0"},
    targets=(
        Target(
            _TRAINER + "compute_loss",
            frozenset(
                {
                    "fbca8c85c759",  # 4.46.0
                    "b65365e4f75c",  # 4.46.2
                    "80fd3bfe1297",  # 4.49.0
                    "c3bd3b186680",  # 4.53.0
                    "babd934e9607",  # 4.54.0
                    "9e4bf9f6391b",  # 4.57.1
                    "6fe6fc1f658e",  # 5.0.0
                    "3284b83db636",  # 5.2.0
                    "4f184d0b0674",  # 5.10.1
                }
            ),
        ),
    ),
    relies_on=(
        Target("transformers.trainer_pt_utils:LabelSmoother.__call__", frozenset({"00f1bc4f52b4"})),
        Target(
            _TRAINER + "training_step",
            frozenset(
                {
                    "a3eb4d9617fe",  # 4.46.0
                    "489a17b67640",  # 4.46.2
                    "1becf95bf714",  # 4.47.0, which hands no count to compute_loss
                    "9cc093595426",  # 4.48.0, the same
                    "13d3847e9107",  # 4.48.1
                    "48afef0a9fe3",  # 4.49.0
                    "a218e0f51e42",  # 4.50.0
                    "4f847ded368d",  # 4.52.1
                    "2597f11e27df",  # 4.53.0
                    "b704c2aa2474",  # 4.55.0
                    "7021488c3393",  # 4.56.0
                    "266fa88bfa26",  # 5.0.0
                    "fd8feb27f8a5",  # 5.2.0
                    "c647bf742b26",  # 5.14.0
                }
            ),
        ),
    ),
    guards=(Guard(_TRAINER + "__init__", {"TF-0405": _reached}),),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    in_window=_windows.in_window,
    own=_own,
    limits="In 4.47.0 and 4.48.0 it needs the repair of TF-0407, which hands on the count.",
)
