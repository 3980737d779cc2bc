"""One window after the other: listen to its backwards, and at the step compare with what the optimizer consumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trainfix.ledger import exchange
from trainfix.ledger.capture import Capture, stacked
from trainfix.ledger.consumers import ALONE, Consumer
from trainfix.ledger.sample import draw
from trainfix.measure.balance import Balance, balance

# What sums in the parameters' dtype may be off by, relative to the size of what is added up.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Finding:
    """What a window's audit says. Of the contributions in `balance`, number k is backward `backwards[k]`: (rank, number).

    outliers: name -> its own scale relative to the window's, the worst first. apart: the share of elements at which
    ranks that should hold the same gradient hold different ones. missing: ranks that did not report.
    """

    balance: Balance
    backwards: tuple[tuple[int, int], ...]
    outliers: Mapping[str, float]
    apart: float
    missing: tuple[int, ...]


class _Part(NamedTuple):
    """What one rank saw: contributions [backwards, elements], the consumed gradient and which elements it holds."""

    rows: torch.Tensor
    consumed: torch.Tensor
    held: torch.Tensor


class Audit:
    """One model and its optimizer on this rank. `listen` before a window's first backward, `judge` at its step."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._sample = draw(consumer.sizes)
        self._capture = Capture(consumer.parameters, self._sample)
        self._earlier: torch.Tensor | None = None
        self._ranks = None if consumer.group is ALONE else exchange.of(consumer.group)
        self._windows = 0
        dtypes = {one.dtype for one in consumer.parameters.values()}
        self._rounding = max((_ROUNDING.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)

    def listen(self) -> None:
        self._capture.attach()

    def judge(self) -> Finding | None:
        """What this window's gradient is made of. To be called on every rank when the optimizer's step begins.

        None on all ranks but the first, and where no backward came since the last step.
        """
        rows, numbers = stacked(self._capture.take(), self._sample)
        parts = self._together(_Part(rows, *self._consumer.consumed(self._sample)))
        if parts is None:
            return None
        here = {rank: part for rank, part in parts.items() if part is not None}
        backwards = tuple((rank, number) for rank, part in here.items() for number in range(len(part.rows)))
        if not backwards:
            return None
        rows = torch.cat([part.rows for part in here.values()])
        consumed, apart = _joined(list(here.values()))
        found = balance(rows, consumed, numbers, earlier=self._earlier, rounding=self._rounding)
        self._earlier = rows
        names = list(self._sample)
        outliers = {names[one.parameter]: one.scale for one in found.outliers}
        return Finding(found, backwards, outliers, apart, tuple(rank for rank, part in parts.items() if part is None))

    def _together(self, mine: _Part) -> dict[int, _Part | None] | None:
        self._windows += 1
        if self._ranks is None:
            return {0: mine}
        found = exchange.gather(self._ranks, str(self._windows), mine._asdict())
        if found is None:
            return None
        return {rank: None if part is None else _Part(**part) for rank, part in found.items()}

    def stop(self) -> None:
        """Leave no hook behind, and forget the window before."""
        self._capture.detach()
        self._capture.take()
        self._earlier = None


def _joined(parts: Sequence[_Part]) -> tuple[torch.Tensor, float]:
    """The consumed gradient, each element from the first rank that holds it, and the share at which others differ."""
    joined, known = parts[0].consumed.clone(), parts[0].held.clone()
    apart = torch.zeros_like(known)
    for part in parts[1:]:
        apart |= known & part.held & (joined != part.consumed)
        joined = torch.where(~known & part.held, part.consumed, joined)
        known |= part.held
    return joined, float(apart.double().mean())
