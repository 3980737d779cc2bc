"""Which windows of a run are audited."""

from __future__ import annotations

from typing import NamedTuple

FOREVER = 10**12


class Schedule(NamedTuple):
    """The first `first` windows, and two in a row at every `every`-th (0: none): what is left of the one before shows
    only in the next."""

    first: int
    every: int = 0

    def is_audited(self, window: int) -> bool:
        """window: counted from 1."""
        recurs = self.every > 0 and window >= self.every and window % self.every in (0, 1 % self.every)
        return window <= self.first or recurs

    def last_of(self, window: int) -> int:
        """The last of the windows in a row that are audited, from this audited one on."""
        if window <= self.first:
            return self.first
        if self.every == 1:
            return FOREVER
        return window + 1 if window % self.every == 0 else window

    def next_after(self, window: int) -> int | None:
        """The next audited window; None where there is none."""
        last = max(window, self.first) + 2 * self.every
        return next((one for one in range(window + 1, last + 1) if self.is_audited(one)), None)
