"""Where a trainer is: in which window, and in which epoch of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

from trainfix.fixes.transformers.windows.division import TRAINER
from trainfix.fixes.transformers.windows.reached import left_alone

_METHODS = ("get_batch_samples", "training_step")


@dataclass
class Window:
    """What was decided about the window that a trainer is in.

    own: whose loss it is, if not one that we know. weights: for each micro-batch that is still to come, its tokens and
    what its mean is multiplied by, None where the loss is right as it is. left: how many are still to come.
    """

    own: str | None
    weights: list[tuple[Any, Any] | None] = field(default_factory=list)
    left: int = 0


@dataclass
class Epoch:
    """Where a trainer is in its data.

    training: the state of the training that is under way. iterator: how to find the epoch's. own: whose loss it is, if
    not one that we know. begun: whether a whole window has been read. waiting: what the epoch before has left over.
    """

    training: Any
    iterator: Callable[[], Any] = field(default=lambda: None)
    own: str | None = None
    begun: bool = False
    waiting: list[Any] = field(default_factory=list)


windows: WeakKeyDictionary[Any, Window] = WeakKeyDictionary()
epochs: WeakKeyDictionary[Any, Epoch] = WeakKeyDictionary()


def in_window() -> Iterator[Any]:
    """Those in mid-window. Not one whose class has methods of its own: what is kept on the object would hide them."""
    for trainer, window in list(windows.items()):
        classes = [next(cls for cls in type(trainer).__mro__ if name in vars(cls)) for name in _METHODS]
        if window.left and all(f"{cls.__module__}:{cls.__name__}." == TRAINER for cls in classes):
            yield trainer


def epoch_of(trainer: Any, iterator: Any) -> Epoch:
    """The epoch that this iterator reads. What is decided once for an epoch is decided here."""
    epoch = epochs.get(trainer)
    if epoch is None or epoch.training is not trainer.state:
        epoch = epochs[trainer] = Epoch(trainer.state)
    if epoch.iterator() is not iterator:
        epoch.iterator, epoch.begun, epoch.own = _reference(iterator), False, left_alone(trainer)
    return epoch


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return ref(thing)
    except TypeError:
        return lambda: thing


def go_on(epoch: Epoch, batches: list[Any], length: int) -> list[Any]:
    """The next window across epochs; what is too short for one waits, as the optimizer's steps do.

    An epoch that is no longer than a window ends with a step in all releases: it is left as it is.
    """
    if not epoch.begun and not epoch.waiting and len(batches) < length:
        return batches
    epoch.begun = True
    pool = epoch.waiting + batches
    ready, epoch.waiting = (pool[:length], pool[length:]) if len(pool) >= length else ([], pool)
    return ready
