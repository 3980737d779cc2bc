"""One window after the other: listen to its backwards, and at the step compare with what the optimizer consumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from trainfix.engine import agreement
from trainfix.ledger import exchange
from trainfix.ledger.capture import Capture, stacked
from trainfix.ledger.consumers import ALONE, Consumer
from trainfix.ledger.sample import draw
from trainfix.measure.balance import Balance, balance

# What sums in the parameters' dtype may be off by, relative to the size of what is added up.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

_UNEXPLAINED = 0.05


@dataclass(frozen=True)
class Finding:
    """What a window's audit says. backwards: (rank, number) of each contribution in `balance`.

    of_ranks: rank -> the balance of what is consumed there alone, where one mixture does not explain it all.
    outliers: name -> its own scale relative to the window's, the worst first. apart: the share of elements at which
    ranks that should hold the same gradient hold different ones. missing: ranks that did not report.
    """

    balance: Balance
    backwards: tuple[tuple[int, int], ...]
    of_ranks: Mapping[int, Balance]
    outliers: Mapping[str, float]
    apart: float
    missing: tuple[int, ...]


class _Seen(NamedTuple):
    """What one rank saw: contributions [backwards, elements], and what is consumed."""

    rows: torch.Tensor
    consumed: torch.Tensor
    held: torch.Tensor


class Audit:
    """Listens to one model on this rank, and judges each window as its optimizer's step begins.

    `judged` gets every finding; on the first rank only, and none for a window without a backward.
    """

    def __init__(self, consumer: Consumer, judged: Callable[[Finding], object]) -> None:
        self._consumer, self._judged = consumer, judged
        self._sample = draw(consumer.sizes)
        self._capture = Capture(consumer.parameters, self._sample)
        self._earlier: torch.Tensor | None = None
        self._ranks = None if consumer.group is ALONE else agreement.join(consumer.group)
        self._windows = 0
        self._handles: list[RemovableHandle] = []
        dtypes = {one.dtype for one in consumer.parameters.values()}
        self._rounding = max((_ROUNDING.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)

    def listen(self) -> None:
        """From the next backward on. To be called on every rank before the same one."""
        self._capture.attach()
        self._handles = [one.register_step_pre_hook(self._stepping) for one in self._consumer.steppers]

    def stop(self) -> None:
        """Leave no hook behind, and forget the window before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._capture.detach()
        self._capture.take()
        self._earlier = None

    def _stepping(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        part = self._consumer.read(optimizer, self._sample)
        if part is None:
            return
        rows, numbers = stacked(self._capture.take(), self._sample)
        together = self._together(_Seen(rows, *part))
        if together is None:
            return
        here = {rank: seen for rank, seen in together.items() if seen is not None}
        backwards = tuple((rank, number) for rank, seen in here.items() for number in range(len(seen.rows)))
        if not backwards:
            return
        rows = torch.cat([seen.rows for seen in here.values()])
        consumed, owner, apart = _joined(here)
        earlier, self._earlier = self._earlier, rows

        def balanced(where: torch.Tensor) -> Balance:
            before = None if earlier is None else earlier[:, where]
            return balance(rows[:, where], consumed[where], numbers[where], earlier=before, rounding=self._rounding)

        found = balanced(torch.ones_like(owner, dtype=torch.bool))
        unexplained = found.residual > _UNEXPLAINED and len(here) > 1
        of_ranks = (
            {rank: balanced(owner == rank) for rank in here if bool((owner == rank).any())} if unexplained else {}
        )
        names = list(self._sample)
        outliers = {names[one.parameter]: one.scale for one in found.outliers}
        missing = tuple(rank for rank, seen in together.items() if seen is None)
        self._judged(Finding(found, backwards, of_ranks, outliers, apart, missing))

    def _together(self, mine: _Seen) -> dict[int, _Seen | None] | None:
        self._windows += 1
        if self._ranks is None:
            return {0: mine}
        found = exchange.gather(self._ranks, str(self._windows), mine._asdict())
        if found is None:
            return None
        return {rank: None if part is None else _Seen(**part) for rank, part in found.items()}


def _joined(seen: Mapping[int, _Seen]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The consumed gradient, each element from the first rank that holds it; that rank, -1 for none; and the share at
    which other ranks hold something else."""
    first = next(iter(seen.values()))
    joined, owner = first.consumed.clone(), torch.full(first.held.shape, -1)
    apart = torch.zeros_like(first.held)
    for rank, part in seen.items():
        known = owner >= 0
        apart |= known & part.held & (joined != part.consumed)
        new = ~known & part.held
        joined, owner = torch.where(new, part.consumed, joined), torch.where(new, rank, owner)
    return joined, owner, float(apart.double().mean())
