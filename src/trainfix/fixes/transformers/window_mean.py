"""Every trained token of a window counts the same in transformers' Trainer up to 4.45. Repairs TF-0401.

Each micro-batch's loss is the mean over its own tokens, and accelerate (or DeepSpeed's engine), DDP and the ranks
average these means: a token of a short answer counts more than one of a long answer. It has been so since there is a
Trainer; transformers#34191 (4.46.0) hands the window's number of tokens to the model, which ends it inside a rank.

What we do: the training data loader looks one window ahead (see `ahead`), and `compute_loss` multiplies the mean by the
micro-batch's tokens and by what is divided out again, and divides by the window's tokens over all ranks. What
`training_step` returns for the log then adds up to the window's mean as well. The same holds for transformers' own
label smoother, which is a mean over the same tokens. A router's auxiliary loss, which some models add, is weighted
along with it.

A training that began before trainfix came, or before its repair was applied, is left as it began.

Delete this file when no supported framework pins a transformers older than 4.46.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Function, Guard, Target
from trainfix.fixes.transformers import recognise

_TRAINER = "transformers.trainer:Trainer."
_SKIP = "accelerate.data_loader:skip_first_batches"

_trainings: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # trainer -> its `ahead.Training`


def _in_window() -> Iterator[Any]:
    return (trainer for trainer, training in list(_trainings.items()) if training.in_window and training.repaired)


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once transformers' Trainer is imported."""
    from trainfix.fixes.transformers.ahead import AheadLoader, Training

    train = originals[_TRAINER + "_inner_training_loop"]
    compute_loss = originals[_TRAINER + "compute_loss"]
    skip = originals[_SKIP]

    @wraps(train)
    def train_ahead(self: Any, *args: Any, **named: Any) -> Any:
        if not _repairs(self):
            return train(self, *args, **named)
        training = _trainings[self] = Training(self, train.__code__)
        try:
            with training.loaders():
                return train(self, *args, **named)
        finally:
            _trainings.pop(self, None)
            training.end_window()

    @wraps(compute_loss)
    def weighted(self: Any, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        training = _trainings.get(self)
        if training is None or training.own is None or not model.training:  # or it evaluates
            return compute_loss(self, model, inputs, *args, **named)
        training.repaired = training.repaired or training.begins
        if not training.repaired:
            return compute_loss(self, model, inputs, *args, **named)
        return training.weigh(compute_loss(self, model, training.smoothable(inputs), *args, **named))

    @wraps(skip)
    def skip_ahead(dataloader: Any, *args: Any, **named: Any) -> Any:
        if type(dataloader) is not AheadLoader:
            return skip(dataloader, *args, **named)
        return dataloader.rest(skip(dataloader.__wrapped__, *args, **named))

    return {_TRAINER + "_inner_training_loop": train_ahead, _TRAINER + "compute_loss": weighted, _SKIP: skip_ahead}


def _own(trainer: Any) -> str | None:
    return recognise.own_loss(trainer) or _own_loop(trainer) or _own_shift(recognise.plain_model(trainer))


def _own_loop(trainer: Any) -> str | None:
    """A subclass may do something before and after what the Trainer does, but not instead of it."""
    for name in ("training_step", "_inner_training_loop"):
        for holder in (trainer, *type(trainer).__mro__):
            function = vars(holder).get(name)
            if function is None:
                continue
            if holder is not trainer and holder.__module__ == "transformers.trainer":
                break
            code = getattr(inspect.unwrap(function), "__code__", None)
            if code is None or name not in code.co_names:
                return f"own loss: {function.__module__}.{function.__qualname__}"
    return None


def _own_shift(model: Any) -> str | None:
    return None if _is_shifted(type(model).forward) else f"not a shifted language model: {type(model).__qualname__}"


@lru_cache
def _is_shifted(forward: Function) -> bool:
    """Whether the loss is the mean over all labels but the first of each row. Some models listed as causal do not
    shift their labels (Bart's decoder, XLNet), and one trains on a padding token besides (XGLM)."""
    try:
        text = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return False
    shifts = "labels = labels[..., 1:]" in text or "labels = labels[:, 1:]" in text
    return shifts and "CrossEntropyLoss()" in text


def _averages(trainer: Any) -> bool:
    return recognise.steps(trainer) > 1 or recognise.ranks(trainer) > 1


def _repairs(trainer: Any) -> bool:
    return _averages(trainer) and recognise.uncovered(trainer) is None and _own(trainer) is None


def _reached(trainer: Any) -> str | None:
    if not _averages(trainer) or _own(trainer) is not None:
        return None
    where = recognise.uncovered(trainer)
    means = f"gradient_accumulation_steps = {recognise.steps(trainer)}, {recognise.ranks(trainer)} ranks"
    return f"a causal language model, {means}" + (f", {where}" if where else "")


def _target(name: str, *shapes: str) -> Target:
    return Target(_TRAINER + name, frozenset(shapes))


# Shapes of transformers 4.41.0 to 4.45.2 and of accelerate 0.18.0 to 1.15.0; the comment is the first release of each.
FIX = Fix(
    name="transformers.window_mean",
    package="transformers",
    advisories=("TF-0401",),
    requires={"transformers": ">=4.41.0"},
    targets=(
        _target("compute_loss", "2d99164bb3da"),  # 4.41.0
        _target(
            "_inner_training_loop",
            "0d038cd31df9",  # 4.41.0
            "aa9749a4d7bc",  # 4.42.0
            "a9fd90260439",  # 4.43.0
            "b9d01ed4b167",  # 4.44.0
            "02da6fe589e6",  # 4.45.0
        ),
        Target(_SKIP, frozenset({"e18b50f1240b", "863dc1ee9cf9", "f47b8dc9153f"})),  # 0.18.0, 0.34.0, 1.15.0
    ),
    relies_on=(
        _target(
            "training_step",
            "f490684401a8",  # 4.41.0
            "d3c256a76be5",  # 4.42.0
            "ff58cdf8537f",  # 4.43.0
            "d5c9332bffc8",  # 4.45.0
        ),
        Target("transformers.trainer_pt_utils:LabelSmoother.__call__", frozenset({"00f1bc4f52b4"})),  # 4.41.0
    ),
    guards=(Guard(_TRAINER + "__init__", {"TF-0401": _reached}),),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    in_window=_in_window,
    own=_own,
    limits=(
        "torch's DataParallel, apex, SageMaker's model parallelism, XLA and Megatron-LM are not repaired, and a run "
        "that reaches them is stopped; with DeepSpeed or accelerate older than 0.28, data shorter than a window"
    ),
)
