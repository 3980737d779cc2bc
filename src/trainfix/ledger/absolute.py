"""The absolute scale of a gradient: how many times that of the mean loss per token it is, clipping apart."""

from __future__ import annotations

import math

from trainfix.ledger.audit import Finding
from trainfix.measure.evenness import Evenness

_OFF = 0.02
_ROUGH = 0.25  # where gradients are so rough that label smoothing cannot be told from a smaller scale
_EXACT = 1e-3
_SAME = 1e-5
_LEAST_LOSS_SCALE = 2**7


def is_off(scale: float, tokens: Evenness) -> bool:
    """Whether it is not 1, for weights as exact as these."""
    return abs(scale - 1) > (max(_OFF, 5 * tokens.noise) if tokens.noise < _EXACT else _ROUGH)


def consumed(tokens: Evenness, found: Finding) -> float:
    """What is consumed relative to the gradient of the mean loss per token, with clipping and all; for a plain loss."""
    return sum(tokens.sums.values()) * found.balance.scale if found.balance is not None else 0.0


def is_whole(found: Finding) -> bool:
    """Whether the gradient is exactly the mean over the ranks of all that came in: nothing is missing then, however
    alike the micro-batches are."""
    return found.balance is not None and abs(found.balance.scale * found.ranks - 1) <= _EXACT


def is_sum(scale: float, tokens: Evenness) -> bool:
    """Whether it is what a sum over the window's tokens has."""
    count = sum(tokens.tokens.values())
    return count > 1 and abs(scale / count - 1) < _OFF


def scale(tokens: Evenness, found: Finding, before: Finding | None) -> float | None:
    """The consumed gradient relative to that of the mean loss per token, before clipping; None if it cannot be seen."""
    if tokens.verdict not in ("even", "uneven") or found.balance is None or tokens.shifted:
        return None
    seen = {(int(rank), int(number)) for rank, number in zip(found.tokens[0], found.tokens[1], strict=True)}
    if not seen.issuperset(found.backwards) or found.balance.verdict == "unbalanced":
        return None
    total = sum(tokens.sums.values())
    consumed, mean = total * found.balance.scale, total / found.ranks
    limit = max(_OFF, 5 * tokens.noise)
    reached = found.balance.scale * found.ranks  # below 1 where the gradient is clipped, or was scaled up before
    if abs(consumed - 1) <= limit:
        return 1.0
    if abs(mean - 1) <= limit and reached <= 1 + limit:
        return consumed if _is_constant(found, before) else 1.0
    # A loss scale is a power of two, and is taken back before the step.
    power = round(math.log2(mean)) if mean > 0 else 0
    if 2**power >= _LEAST_LOSS_SCALE and reached * 2**power <= 1 + limit:
        unscaled: float = mean / 2**power
        return 1.0 if abs(unscaled - 1) <= limit else unscaled
    return consumed if consumed > 1 else mean


def _is_constant(found: Finding, before: Finding | None) -> bool:
    """Whether two windows of different size are scaled down by the same factor, which clipping would not do."""
    if before is None or before.balance is None or found.balance is None or before.balance.verdict != "balanced":
        return False
    if not (found.balance.scale and found.size):
        return False
    alike = abs(before.balance.scale / found.balance.scale - 1) < _SAME
    return alike and abs(before.size / found.size - 1) > 100 * _SAME
