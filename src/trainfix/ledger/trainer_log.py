"""The loss that transformers' Trainer logs, against the mean loss per token that the ledger saw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from trainfix.ledger.tensors import alive
from trainfix.ledger.verdict import Verdict

_OFF, _OFF_IN_A_SAMPLE = 0.02, 0.25


def follow(verdicts: list[Verdict], remark: Callable[[str], object]) -> None:
    """Add a callback to every Trainer of this process, which gives `remark` what is off in its logs.

    Only logs of one window can be compared: with `logging_steps` of 1, or up to the first log.
    """
    module = sys.modules.get("transformers.trainer")
    kind = getattr(module, "Trainer", None)
    callback: Any = getattr(module, "TrainerCallback", None)
    if kind is None or callback is None:
        return

    class Logged(callback):  # type: ignore[misc]
        seen = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: object) -> None:
            windows, self.seen = state.global_step - self.seen, state.global_step
            loss = (logs or {}).get("loss")
            last = verdicts[-1] if verdicts else None
            if windows == 1 and loss and last is not None and last.finding.window == state.global_step:
                said = compare(float(loss), last)
                if said:
                    remark(said)

    for trainer in alive(kind):
        trainer.add_callback(Logged())


def compare(logged: float, verdict: Verdict) -> str:
    """What is off between a logged loss and the window's own, "" for nothing."""
    tokens = verdict.tokens
    if tokens is None or tokens.verdict not in ("even", "uneven") or tokens.smoothing or tokens.shifted:
        return ""
    total = sum(tokens.tokens.values())
    mean = sum(tokens.losses[number] * count for number, count in tokens.tokens.items()) / total if total else 0.0
    limit = _OFF if tokens.positions >= total else _OFF_IN_A_SAMPLE
    if not mean or abs(logged / mean - 1) <= limit:
        return ""
    return (
        f"window {verdict.finding.window}: the logged loss is {logged / mean:.3g} times the mean loss per token "
        f"({logged:.4g} and {mean:.4g})"
    )
