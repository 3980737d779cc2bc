"""Does a micro-batch belong to a window that began with the repair, or to one that began before it?

Trainer tells accelerate before each micro-batch whether it is the window's last (`sync_gradients`), in every release
since 4.46, with and without DeepSpeed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from trainfix.engine.contract import window_ended


class MidWindow:
    """The windows of all trainers of the process, as a repair that wraps `method` of Trainer, or of another class
    (its module and name), sees them.

    A trainer that is in mid-window when the repair is put in place (`begin`) finishes that window without it.
    """

    def __init__(self, method: str, of: tuple[str, str] = ("transformers.trainer", "Trainer")) -> None:
        self._method, self._class = method, of
        self._under_way = False
        self._ours: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._open: WeakSet[Any] = WeakSet()

    def begin(self) -> None:
        """The repair is being put in place."""
        state: Any = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
        self._under_way = state is not None and state._shared_state.get("sync_gradients") is False
        self._ours.clear()
        self._open.clear()

    @contextmanager
    def micro_batch(self, trainer: Any) -> Iterator[bool]:
        """Around what is done for one micro-batch: whether its window is one that we repair from its beginning."""
        ours = self._ours[trainer] = self._ours.get(trainer, not self._under_way) or not _holds_gradients(trainer)
        self._open.add(trainer)
        try:
            yield ours
        finally:
            if trainer.accelerator.sync_gradients:
                self._ours[trainer] = True
                self._open.discard(trainer)
                window_ended(trainer)

    def in_window(self) -> Iterator[Any]:
        """The trainers in the middle of a window that we repair. Not one whose class has a method of its own in
        place of that: what is kept on the object would hide it."""
        for trainer in list(self._open):
            first = next(cls for cls in type(trainer).__mro__ if self._method in vars(cls))
            if self._ours.get(trainer) and (first.__module__, first.__name__) == self._class:
                yield trainer


def _holds_gradients(trainer: Any) -> bool:
    """Trainer sets them to None when a window ends, and when a training begins. DeepSpeed keeps them elsewhere."""
    return bool(trainer.is_deepspeed_enabled) or any(one.grad is not None for one in trainer.model.parameters())
