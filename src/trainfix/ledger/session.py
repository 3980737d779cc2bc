"""``with trainfix.ledger(model, optimizer): ...``: audit every window inside the block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trainfix import settings
from trainfix.ledger.schedule import FOREVER
from trainfix.ledger.sink import Sink
from trainfix.ledger.verdict import Verdict
from trainfix.ledger.watch import Watch


@contextmanager
def ledger(
    model: torch.nn.Module, optimizer: Any, *, action: str = "warn", out: str | None = None
) -> Iterator[Sequence[Verdict]]:
    """Audit each window of `optimizer` (what ends with its `step`), and give the verdicts so far, on the first rank.

    model: what the loop calls, as it calls it: the DistributedDataParallel around it, the engine of DeepSpeed.
    optimizer: torch's, or what accelerate or DeepSpeed made of it. action: "warn", or "stop" to raise
    `trainfix.UnbalancedError` before the optimizer takes a step that is wrong. out: a folder for the records, one JSON
    line per window; None for none.

    Raises TypeError where model or optimizer is something else, ValueError for an unknown action.
    """
    if action not in settings.ACTIONS:
        raise ValueError(f"action={action!r} means nothing; valid: {', '.join(settings.ACTIONS)}")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be the torch.nn.Module that the loop calls, not {type(model).__name__}")
    inner = _innermost(optimizer)
    watch = Watch(settings.Ledger(first=FOREVER, action=action, out=out), Sink(out), only=inner)
    watch.begin(model)
    try:
        yield watch.verdicts
    finally:
        watch.end()


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in what accelerate and DeepSpeed put around it."""
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer or hold one, not {type(optimizer).__name__}")
    return inner
