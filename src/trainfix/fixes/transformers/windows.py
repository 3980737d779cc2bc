"""transformers 4.46 to 4.54: each token of a window counts the same, on every rank, in every window, for every backend.

From 4.46 on (#34191, #34198) Trainer reads a window's micro-batches before the first backward, in `get_batch_samples`,
counts their tokens, and lets the model divide its sum by that count. What went wrong around it, and what repaired it:

- TF-0402: the count is the rank's own, and the ranks' means are averaged (#34373 added `average_tokens_across_devices`
  in 4.46.2, off; #39395 turned it on in 4.54.0). Here: the count over all ranks, divided by the number of ranks.
- TF-0403: 4.46.2 to 4.48.3 under DeepSpeed: the engine divides by the steps what is right already. #35808 (4.49.0) and
  we ask it not to.
- TF-0407: 4.47.0 (#34915) and 4.48.0 (#35438) do not hand the count on to the model. We put it
  into the micro-batch, whose keys are the arguments of the model.
- TF-0408: to 4.47.1, a model that takes no count: nobody divides by the steps. TF-0406: later, the configured steps
  divide also a shorter window (to 4.54.1). We weigh such a micro-batch's mean with its tokens.
- TF-0409: to 4.51.3 the length of an epoch's last window is computed from the number of rows and not of micro-batches:
  it may be read too short, and never ends in a step (#37923, 4.52.1). We always read all there is.
- TF-0410: 4.46: optimizer steps do not know of epochs, the count and the reduction over ranks do. We let windows go on
  across epochs, as the steps do: what an epoch leaves over waits for the next one.
- TF-0411: 4.46.2 asks DDP not to reduce the window's last micro-batch, where it means all the others: what that one
  adds stays the rank's own (4.46.3 turned the condition round). We let DDP reduce the last one, too.

A decision holds for a whole window: it is made where the window is read.

Delete this file when no supported framework allows transformers older than 4.55.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from math import ceil
from typing import Any
from weakref import WeakKeyDictionary, ref

from packaging.version import Version

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended
from trainfix.engine.replace import live_shape
from trainfix.fixes.token_weighting import IGNORED
from trainfix.fixes.transformers.recognise import (
    own_computation,
    own_loss,
    plain_model,
    ranks,
    steps,
    uncovered,
    uses_deepspeed,
)

_TRAINER = "transformers.trainer:Trainer."
_METHODS = ("get_batch_samples", "training_step")
_COUNT = "num_items_in_batch"

# What `training_step` divides a loss by, before it hands it to accelerate: shape -> in which case by the steps.
_DIVIDES = {
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
_COUNT_IS_LOST = {"1becf95bf714", "9cc093595426"}
_LAST_IS_NOT_REDUCED = {"2ccfb878d2e3"}  # _inner_training_loop, 4.46.2
_STEPS_KNOW_NO_EPOCHS = {"de44d4ab4466", "2ccfb878d2e3", "3d891afecc80"}  # _inner_training_loop, 4.46.1, .2, .3


@dataclass
class _Window:
    """What was decided about the window that a trainer is in.

    own: whose loss it is, if not one that we know. weights: for each micro-batch that is still to come, its tokens and
    what its mean is multiplied by, None where the loss is right as it is. left: how many are still to come.
    """

    own: str | None
    weights: list[tuple[Any, Any] | None] = field(default_factory=list)
    left: int = 0


@dataclass
class _Epoch:
    """Where a trainer is in its data.

    training: the state of the training that is under way. iterator: how to find the epoch's. own: whose loss it is, if
    not one that we know. begun: whether a whole window has been read. waiting: what the epoch before has left over.
    """

    training: Any
    iterator: Callable[[], Any] = field(default=lambda: None)
    own: str | None = None
    begun: bool = False
    waiting: list[Any] = field(default_factory=list)


_windows: WeakKeyDictionary[Any, _Window] = WeakKeyDictionary()
_epochs: WeakKeyDictionary[Any, _Epoch] = WeakKeyDictionary()


def _in_window() -> Iterator[Any]:
    """Those in mid-window. Not one whose class has methods of its own: what is kept on the object would hide them."""
    for trainer, window in list(_windows.items()):
        classes = [next(cls for cls in type(trainer).__mro__ if name in vars(cls)) for name in _METHODS]
        if window.left and all(f"{cls.__module__}:{cls.__name__}." == _TRAINER for cls in classes):
            yield trainer


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once transformers.trainer is imported."""
    _windows.clear()  # after a revert transformers' code may have gone on with them
    _epochs.clear()
    read = originals[_TRAINER + "get_batch_samples"]
    train = originals[_TRAINER + "training_step"]
    shape = live_shape(_TRAINER + "training_step")
    loop = live_shape(_TRAINER + "_inner_training_loop")
    across = "TF-0410" in advisories and loop in _STEPS_KNOW_NO_EPOCHS
    reduces_last = "TF-0411" in advisories and loop in _LAST_IS_NOT_REDUCED

    @wraps(read)
    def read_window(self: Any, epoch_iterator: Any, num_batches: int, *rest: Any) -> Any:
        epoch = _epoch_of(self, epoch_iterator)
        if epoch.own is not None:
            batches, count = read(self, epoch_iterator, num_batches, *rest)
            _windows[self] = _Window(epoch.own, [None] * len(batches), len(batches))
            return batches, count
        wanted = steps(self) if "TF-0409" in advisories or across else num_batches
        batches, count = read(self, epoch_iterator, wanted, *rest)
        if across:
            batches = _go_on(epoch, batches, steps(self))
        batches, count, weights = _weighed(self, batches, count, advisories, shape, recount=across)
        _windows[self] = _Window(None, weights, len(batches))
        return batches, count

    @wraps(train)
    def train_weighed(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        window = _windows.get(self)
        if window is None or not window.left:  # a window that began without us
            return train(self, model, inputs, num_items_in_batch)
        with _reduced(model) if reduces_last and window.left == 1 else nullcontext():
            return train_in(window, self, model, inputs, num_items_in_batch)

    def train_in(window: _Window, self: Any, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        weight = window.weights[-window.left]
        handed_on = shape in _COUNT_IS_LOST and _COUNT in inputs
        right = "TF-0403" in advisories and _right_already(self, shape, num_items_in_batch, handed_on, window.own)
        try:
            if weight is None and not (uses_deepspeed(self) and (right or handed_on)):
                return train(self, model, inputs, num_items_in_batch)
            sent = _Sent(weight, _divisor(self, shape, num_items_in_batch))
            with _backward_undivided(self, sent):
                returned = train(self, model, inputs, num_items_in_batch)
            return returned if weight is None else sent.loss
        finally:
            window.left -= 1
            if not window.left:
                window_ended(self)

    return {_TRAINER + "get_batch_samples": read_window, _TRAINER + "training_step": train_weighed}


def _epoch_of(trainer: Any, iterator: Any) -> _Epoch:
    """The epoch that this iterator reads. What is decided once for an epoch is decided here."""
    epoch = _epochs.get(trainer)
    if epoch is None or epoch.training is not trainer.state:
        epoch = _epochs[trainer] = _Epoch(trainer.state)
    if epoch.iterator() is not iterator:
        epoch.iterator, epoch.begun, epoch.own = _reference(iterator), False, _left_alone(trainer)
    return epoch


@contextmanager
def _reduced(model: Any) -> Iterator[None]:
    """Let DDP reduce what `backward` adds meanwhile, although it was asked not to."""
    before = getattr(model, "require_backward_grad_sync", None)
    if before is None:  # one process
        yield
        return
    model.require_backward_grad_sync = True
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return ref(thing)
    except TypeError:
        return lambda: thing


def _go_on(epoch: _Epoch, batches: list[Any], length: int) -> list[Any]:
    """The next window across epochs; what is too short for one waits, as the optimizer's steps do.

    An epoch that is no longer than a window ends with a step in all releases: it is left as it is.
    """
    if not epoch.begun and not epoch.waiting and len(batches) < length:
        return batches
    epoch.begun = True
    pool = epoch.waiting + batches
    ready, epoch.waiting = (pool[:length], pool[length:]) if len(pool) >= length else ([], pool)
    return ready


def _weighed(
    trainer: Any, batches: list[Any], count: Any, advisories: frozenset[str], shape: str | None, *, recount: bool
) -> tuple[list[Any], Any, list[tuple[Any, Any] | None]]:
    """The window's micro-batches, the count that its model divides by, and the weights of the means where it does not.

    Every rank comes here for every window. Nothing here waits for the device.
    """
    weights: list[tuple[Any, Any] | None] = [None] * len(batches)
    takes = bool(trainer.model_accepts_loss_kwargs)
    adds_up = bool(getattr(trainer.args, "average_tokens_across_devices", False))
    means = not takes and trainer.label_smoother is None and bool(advisories & {"TF-0406", "TF-0408"})
    over_ranks = ranks(trainer) > 1 and "TF-0402" in advisories and not adds_up
    if not (means or over_ranks or recount or (shape in _COUNT_IS_LOST and takes)):
        return batches, count, weights
    if any("labels" not in batch for batch in batches):
        return batches, count, weights
    tokens = [batch["labels"][..., 1:].ne(IGNORED).sum() for batch in batches]
    if means:
        total = _added_up(trainer, tokens)
        return batches, count, [(one, one * ranks(trainer) / total.clamp(min=1)) for one in tokens]
    if over_ranks:
        count = _added_up(trainer, tokens).clamp(min=1) / ranks(trainer)
    elif recount and takes:
        count = (_added_up(trainer, tokens) if adds_up else sum(tokens)).clamp(min=1) if tokens else None
    if "TF-0407" in advisories and shape in _COUNT_IS_LOST and takes:
        batches = [{**batch, _COUNT: count} for batch in batches]
    return batches, count, weights


def _added_up(trainer: Any, tokens: list[Any]) -> Any:
    """The sum over the window and over all ranks, a 0-dim tensor on the trainer's device."""
    import torch
    from torch import distributed

    total = torch.zeros((), dtype=torch.int64, device=trainer.accelerator.device)
    for one in tokens:
        total += one.to(total.device)
    if ranks(trainer) > 1:
        distributed.all_reduce(total)
    return total


@dataclass
class _Sent:
    """A micro-batch's loss on its way to `backward`: what it has been divided by and what it must be multiplied with,
    and what became of it."""

    weight: tuple[Any, Any] | None
    divisor: float
    loss: Any = None


@contextmanager
def _backward_undivided(trainer: Any, sent: _Sent) -> Iterator[None]:
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


def _divisor(trainer: Any, shape: str | None, count: Any) -> float:
    """What `training_step` divides the loss by."""
    when = _DIVIDES.get(shape or "", "never")
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


def _right_already(trainer: Any, shape: str | None, count: Any, handed_on: bool, own: str | None) -> bool:
    """Whether the loss that goes to `backward` needs no division: `training_step` or the count has done it."""
    if shape not in _ENGINE_DIVIDES or steps(trainer) == 1:
        return False
    if _divisor(trainer, shape, count) > 1:
        return True
    counted = count is not None and (handed_on or shape not in _COUNT_IS_LOST) and shape not in _MULTIPLIES
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


def _left_alone(trainer: Any) -> str | None:
    """Why the token weights of this trainer are left as they are, or None."""
    if getattr(getattr(plain_model(trainer), "config", None), "output_router_logits", False):
        return "a router's loss is part of the model's"
    return own_loss(trainer) or uncovered(trainer)


def _shape() -> str:
    """That of `training_step`, or, where its body is unknown, the one that its release has."""
    shape = live_shape(_TRAINER + "training_step")
    if shape in _DIVIDES:
        return shape
    installed = Version(sys.modules["transformers"].__version__)
    return [known for known, since in _SINCE if Version(since) <= installed][-1]


def _divided_twice(trainer: Any) -> str | None:
    shape, count = _shape(), trainer.model_accepts_loss_kwargs or None
    if not uses_deepspeed(trainer) or not _right_already(trainer, shape, count, False, own_loss(trainer)):
        return None
    return f"DeepSpeed with gradient_accumulation_steps = {steps(trainer)}"


def _by_rank(trainer: Any) -> str | None:
    if ranks(trainer) == 1 or getattr(trainer.args, "average_tokens_across_devices", False):
        return None
    return None if own_loss(trainer) else f"{ranks(trainer)} ranks, and average_tokens_across_devices is not set"


def _windowed(trainer: Any) -> str | None:
    return f"gradient_accumulation_steps = {steps(trainer)}" if steps(trainer) > 1 and not own_loss(trainer) else None


def _mean(trainer: Any) -> str | None:
    if trainer.model_accepts_loss_kwargs or trainer.label_smoother is not None or not _windowed(trainer):
        return None
    return f"{type(plain_model(trainer)).__name__} takes no {_COUNT}, {_windowed(trainer)}"


def _count_lost(trainer: Any) -> str | None:
    return _windowed(trainer) if trainer.model_accepts_loss_kwargs else None


def _end_not_read(trainer: Any) -> str | None:
    rows, batches = _epoch_length(trainer)
    if not (_windowed(trainer) and 0 < rows % steps(trainer) < batches % steps(trainer)):
        return None
    return f"epochs of {rows} rows, {batches} micro-batches on a rank, and {_windowed(trainer)}"


def _across_epochs(trainer: Any) -> str | None:
    _, batches = _epoch_length(trainer)
    if not (_windowed(trainer) and batches > steps(trainer) and batches % steps(trainer)):
        return None
    return f"epochs of {batches} micro-batches, and {_windowed(trainer)}"


def _epoch_length(trainer: Any) -> tuple[int, int]:
    """The rows of an epoch and the micro-batches of a rank, 0 where there is one epoch only or it has no length."""
    args = trainer.args
    try:
        rows = len(trainer.train_dataset)
    except TypeError:
        return 0, 0
    batches = ceil(ceil(rows / args.train_batch_size) / ranks(trainer))
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / max(batches // steps(trainer), 1)
    return (rows, batches) if epochs > 1 else (0, 0)


def _unreduced(trainer: Any) -> str | None:
    if live_shape(_TRAINER + "_inner_training_loop") not in _LAST_IS_NOT_REDUCED:
        return None
    several = ranks(trainer) > 1 and not uses_deepspeed(trainer)
    return f"{ranks(trainer)} ranks, {_kind(trainer)}" if several else None


def _kind(trainer: Any) -> str:
    return str(trainer.accelerator.distributed_type).rpartition(".")[2]


_REACHED: Mapping[str, Callable[..., str | None]] = {
    "TF-0402": _by_rank,
    "TF-0403": _divided_twice,
    "TF-0406": _mean,
    "TF-0407": _count_lost,
    "TF-0408": _mean,
    "TF-0409": _end_not_read,
    "TF-0410": _across_epochs,
    "TF-0411": _unreduced,
}


def _repairs(trainer: Any) -> bool:
    if _unreduced(trainer):
        return _kind(trainer).startswith("MULTI_")  # DDP
    if _divided_twice(trainer):
        return True
    return _left_alone(trainer) is None and (steps(trainer) > 1 or ranks(trainer) > 1)


def _own(trainer: Any) -> str | None:
    return None if _divided_twice(trainer) or _unreduced(trainer) else own_loss(trainer)


def _target(name: str, *shapes: str) -> Target:
    return Target(_TRAINER + name, frozenset(shapes))


# The comments are the first releases that have each shape.
FIX = Fix(
    name="transformers.windows",
    package="transformers",
    advisories=tuple(_REACHED),
    requires={"transformers": ">=4.46.0,<4.55"},
    targets=(
        _target(
            "get_batch_samples",
            "10f044afdaec",  # 4.46.1
            "7bf9428ee7d5",  # 4.46.2
            "e6dab75dfcb1",  # 4.47.1
            "220e4786b6fe",  # 4.48.0
            "7d2d4440cd8c",  # 4.48.1
            "f3b4f02fe4fa",  # 4.50.0
            "48854b6d0656",  # 4.51.0
            "cae9e7fbe7ea",  # 4.53.0
        ),
        _target("training_step", *_DIVIDES),
    ),
    relies_on=(
        _target(
            "compute_loss",
            "fbca8c85c759",  # 4.46.1
            "b65365e4f75c",  # 4.46.2
            "80fd3bfe1297",  # 4.49.0
            "c3bd3b186680",  # 4.53.0
            "babd934e9607",  # 4.54.0
        ),
        _target(
            "_inner_training_loop",
            "de44d4ab4466",  # 4.46.1
            "2ccfb878d2e3",  # 4.46.2
            "3d891afecc80",  # 4.46.3
            "34c42fe8324d",  # 4.47.0
            "bc61e1e66eb7",  # 4.47.1
            "8b3df53bec8a",  # 4.49.0
            "727783622bc2",  # 4.50.0
            "bf786ec5b5b2",  # 4.51.0
            "bf92e1c2f8cd",  # 4.52.1
            "75dfc041c554",  # 4.53.0
            "c423785745f2",  # 4.53.1
            "a402b4b5b1fb",  # 4.54.0
        ),
        Target("accelerate.accelerator:Accelerator.backward", frozenset({"cc7950cf28b9", "fa989e4da879"})),
    ),
    guards=(Guard(_TRAINER + "__init__", _REACHED),),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    in_window=_in_window,
    own=_own,
    limits="apex, SageMaker, DataParallel and tensor, context or sequence parallel runs are left as they are",
)
