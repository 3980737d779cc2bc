"""What happened to one optimizer since its last step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary


class Window:
    """The window of one optimizer, as this rank sees it.

    ours: we accumulate; else DeepSpeed's own code does, and what it loses is restored at the end.
    foreign: began before trainfix saw it, so DeepSpeed finishes it.
    left: parameters that DeepSpeed's code took -> whether their sum stands in the master gradient (else in its buffer).
    closed_at: `micro_step_id` of the last `backward` of DeepSpeed's own that was a boundary.
    touched: parameters whose master gradient holds this window's sum because we put it there.
    cleared: the master gradients of all others are zero.
    settled: norms and overflow flag are those of the sums.
    queue: parameters of the bucket that is being reduced.
    """

    __slots__ = ("cleared", "closed_at", "foreign", "left", "ours", "queue", "reducing", "settled", "touched")

    def __init__(self, *, foreign: bool = False) -> None:
        self.foreign = foreign
        self.ours = False
        self.reducing = False
        self.settled = True
        self.cleared = False
        self.left: dict[int, bool] = {}
        self.closed_at: int | None = None
        self.touched: set[int] = set()
        self.queue: list[Any] = []

    @property
    def begun(self) -> bool:
        return bool(self.foreign or self.ours or self.left)


known: WeakKeyDictionary[Any, Window] = WeakKeyDictionary()


def of(optimizer: Any) -> Window:
    """The optimizer's window. Of an optimizer that trainfix meets in mid-window, that window is DeepSpeed's."""
    window = known.get(optimizer)
    if window is None:
        window = known[optimizer] = Window(foreign=optimizer.micro_step_id > _first_micro_step(optimizer))
    return window


def in_window() -> Iterator[Any]:
    """The optimizers that are in the middle of a window right now."""
    return (optimizer for optimizer, window in list(known.items()) if window.begun)


def forget_idle() -> None:
    """After a revert DeepSpeed's code may be in mid-window where we remember none: such optimizers are strangers."""
    for optimizer, window in list(known.items()):
        if not window.begun:
            del known[optimizer]


def _first_micro_step(optimizer: Any) -> int:
    """`micro_step_id` in a window's first micro-batch: 0, but up to 0.15.1 it is 1 before the first step."""
    counts_from_zero = hasattr(sys.modules[type(optimizer).__module__], "INITIAL_MICRO_STEP_ID")
    return 0 if counts_from_zero or optimizer._global_grad_norm != 0 else 1
