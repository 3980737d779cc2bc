"""Where nothing else fits, and where there is no link: the sum is in the masters when `add` returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainfix.gradcopy.queues import HostDevice
from trainfix.gradcopy.segments import Adder, Segment
from trainfix.gradcopy.squares import Squares

_HOST = torch.device("cpu")


class Inline:
    """Blocks on the caller's stream. Any device, any dtype of the masters, pinned or not."""

    name = "torch"

    def __init__(self, adder: Adder) -> None:
        self._adder = adder
        self._squares = Squares()

    def describe(self) -> str:
        return "torch"

    def add(self, segments: Sequence[Segment], *, last: bool) -> None:
        self._squares.forget(segments)
        squares = self._squares.room(self._adder, segments, HostDevice().caller(), _HOST) if last else None
        self._adder.add(segments, squares)

    def wait(self) -> None: ...

    def squares(self) -> dict[int, float]:
        return self._squares.read()

    def renew(self) -> None:
        self._squares.clear()
