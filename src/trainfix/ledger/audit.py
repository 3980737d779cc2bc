"""One window after the other: listen to its backwards, and at the step compare with what the optimizer consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainfix.ledger.capture import Capture, stacked
from trainfix.ledger.consumers import Consumer
from trainfix.ledger.sample import draw
from trainfix.measure.balance import Balance, balance

# What sums in the parameters' dtype may be off by, relative to the size of what is added up.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Finding:
    """What a window's audit says. outliers: name -> its own scale relative to the window's, the worst first."""

    balance: Balance
    backwards: int
    outliers: Mapping[str, float]


class Audit:
    """One model and its optimizer on this rank. `listen` before a window's first backward, `judge` at its step."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._sample = draw(consumer.sizes)
        self._capture = Capture(consumer.parameters, self._sample)
        self._earlier: torch.Tensor | None = None
        dtypes = {one.dtype for one in consumer.parameters.values()}
        self._rounding = max((_ROUNDING.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)

    def listen(self) -> None:
        self._capture.attach()

    def judge(self) -> Finding | None:
        """None where no backward came since the last step: there is nothing to balance."""
        rows, numbers = stacked(self._capture.take(), self._sample)
        if not len(rows):
            return None
        consumed, _ = self._consumer.consumed(self._sample)
        found = balance(rows, consumed, numbers, earlier=self._earlier, rounding=self._rounding)
        names = list(self._sample)
        self._earlier = rows
        return Finding(found, len(rows), {names[one.parameter]: one.scale for one in found.outliers})

    def stop(self) -> None:
        """Leave no hook behind, and forget the window before."""
        self._capture.detach()
        self._capture.take()
        self._earlier = None
