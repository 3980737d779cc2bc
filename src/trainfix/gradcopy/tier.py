"""What every way to the host can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trainfix.gradcopy.segments import Segment


class Tier(Protocol):
    """One way to carry gradients to the host. All of them leave the same bits there."""

    @property
    def name(self) -> str: ...

    def describe(self) -> str:
        """The tier in a few words, with what it holds in memory."""

    def add(self, segments: Sequence[Segment], *, last: bool) -> None:
        """Take a bucket. On return the gradients may be overwritten by what is queued on the caller's stream.

        last: these are the last gradients of the window, as far as the caller knows: take their sums of squares.
        """

    def wait(self) -> None:
        """Until every sum stands in the masters."""

    def squares(self) -> dict[int, float]:
        """Key -> sum of squares, where it was taken on the way. After `wait`."""

    def renew(self) -> None:
        """The window is over, or given up: nothing is under way any more, and nothing is remembered."""
