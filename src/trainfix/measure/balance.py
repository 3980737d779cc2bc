"""Double entry for one window: does the gradient that the optimizer is about to consume hold every micro-batch once?

What each backward contributed is known, and what was consumed; only a common factor is not (the mean over ranks, the
loss scale, clipping). So the first question is whether consumed = scale * (sum of all contributions), parameter by
parameter, which can be answered however alike the micro-batches are. Only where it is not, the coefficients are solved
for, which takes micro-batches that differ.
Plain torch arithmetic in float64; nothing of trainfix is imported but its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainfix.measure.coefficients import measure


@dataclass(frozen=True)
class Outlier:
    """A parameter whose gradient is not `scale` times the sum of its contributions.

    parameter: its number. scale: its own factor relative to the window's, 1 = right, 0 = nothing arrived.
    error: |consumed - scale * sum| relative to the size of what was added up.
    """

    parameter: int
    scale: float
    error: float


@dataclass(frozen=True)
class Balance:
    """What a window's consumed gradient is made of.

    verdict: balanced, unbalanced, or unclear: the contributions are so alike that a lost one would only change `scale`.
    scale: consumed / sum of contributions, where most parameters agree.
    coefficients: one per contribution relative to `scale`, 1 = right, 0 = dropped. earlier: of the previous window's
    contributions, 0 = right. residual: the part of consumed that nothing of both explains.
    determined: False where the contributions are too alike for every single coefficient to follow.
    outliers: parameters that are not balanced, the worst first; the coefficients are theirs where most others are.
    rough: in a balanced window, the largest error of a parameter that is more than the arithmetic's rounding, but no
    more than 16 bits' and without a direction: what was added up in less precision than it came in; 0 where none is.
    clipped_at: the value at which every element of the sum was clipped, 0 where none was.
    """

    verdict: str
    scale: float
    coefficients: tuple[float, ...]
    earlier: tuple[float, ...]
    residual: float
    determined: bool
    outliers: tuple[Outlier, ...]
    rough: float = 0.0
    clipped_at: float = 0.0


_ROUGH = 0.03  # what sums of bfloat16 may be off by
_DIRECTED = 0.01  # coefficients that are off by more are no rounding


def balance(
    contributions: torch.Tensor,
    consumed: torch.Tensor,
    parameters: torch.Tensor,
    *,
    earlier: torch.Tensor | None = None,
    rounding: float = 1e-5,
) -> Balance:
    """Compare `consumed` [elements] with `contributions` [backwards, elements], all ranks' one after the other.

    parameters: int [elements], the number of the parameter that each element is of. earlier: [any, elements], what the
    previous window's backwards contributed. rounding: what arithmetic alone may be off by, relative to the size of what
    is added up: 1e-5 suits sums in float32, 2e-2 such in bfloat16.

    Raises ValueError, naming the shape, when the shapes do not fit together or a value is not finite.
    """
    if parameters.shape != consumed.shape or contributions.dim() != 2 or contributions.shape[1:] != consumed.shape:
        raise ValueError(
            f"contributions must be [backwards, elements], consumed and parameters [elements], not "
            f"{list(contributions.shape)}, {list(consumed.shape)} and {list(parameters.shape)}"
        )
    rows, got = contributions.detach().to(torch.float64), consumed.detach().to(torch.float64)
    if not bool(torch.isfinite(rows).all() and torch.isfinite(got).all()):
        raise ValueError("a contribution or the consumed gradient is NaN or infinite: no window to balance")
    names, place = torch.unique(parameters, return_inverse=True)
    scale, own, errors = _by_parameter(rows, got, place, len(names))
    wrong = errors > rounding
    outliers = tuple(
        Outlier(int(names[number]), float(own[number] / scale) if scale else float("inf"), float(errors[number]))
        for number in torch.argsort(errors, descending=True).tolist()
        if wrong[number]
    )
    right, stale = (1.0,) * len(rows), (0.0,) * (0 if earlier is None else len(earlier))
    if not outliers:
        alike = len(rows) > 1 and _rank(rows, rounding) < 2
        return Balance("unclear" if alike else "balanced", scale, right, stale, 0.0, not alike, ())
    if float(errors.max()) <= _ROUGH and _is_rounding(rows, got, earlier, scale, outliers):
        return Balance("balanced", scale, right, stale, 0.0, True, (), float(errors.max()))
    value, common = _clipped_at(rows.sum(0), got, rounding)
    if value:
        return Balance("balanced", common, right, stale, 0.0, True, (), clipped_at=value)
    few = int(wrong.sum()) * 2 <= len(names)
    looked_at = wrong[place] if few else torch.ones_like(place, dtype=torch.bool)
    return _explained(rows, got, earlier, looked_at, scale if few else None, rounding, outliers)


def _by_parameter(
    rows: torch.Tensor, got: torch.Tensor, place: torch.Tensor, count: int
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The common scale, each parameter's own, and each one's error against the common one: [parameters]."""

    def per_parameter(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, place, values)

    total = rows.sum(0)
    square, along = per_parameter(total * total), per_parameter(total * got)
    own = torch.where(square > 0, along / torch.where(square > 0, square, 1.0), torch.inf)
    there = (
        own[(square > 0) & (own.abs() > 1e-6 * own[square > 0].abs().max())] if bool((square > 0).any()) else own[:0]
    )
    seen = torch.sort(there).values  # of parameters for which anything arrived
    scale = float(seen[len(seen) // 2]) if len(seen) else 0.0
    size = torch.stack([per_parameter(row * row).sqrt() for row in rows]).sum(0) * abs(scale)
    off = per_parameter((got - scale * total) ** 2).sqrt()
    return (
        scale,
        own,
        torch.where(size > 0, off / torch.where(size > 0, size, 1.0), torch.where(off > 0, torch.inf, 0.0)),
    )


def _clipped_at(total: torch.Tensor, got: torch.Tensor, rounding: float) -> tuple[float, float]:
    """v and scale for which got = clamp(scale * total, -v, v), where some elements and not all are clipped; else 0."""
    value = float(got.abs().max())
    at = got.abs() >= value * (1 - rounding)
    free = ~at & (total != 0)
    if int(at.sum()) < 2 or not bool(free.any()):
        return 0.0, 0.0
    scale = float((got[free] * total[free]).sum() / (total[free] ** 2).sum())
    error = (got - (scale * total).clamp(-value, value)).norm() / got.norm()
    return (value, scale) if scale > 0 and float(error) <= rounding else (0.0, 0.0)


def _is_rounding(
    rows: torch.Tensor,
    got: torch.Tensor,
    earlier: torch.Tensor | None,
    scale: float,
    outliers: Sequence[Outlier],
) -> bool:
    """Whether small errors have no direction: no micro-batch and no parameter as a whole counts for more or less."""
    before = None if earlier is None else earlier.detach().to(torch.float64) * scale
    found = measure(rows * scale, got, earlier=before, rcond=_ROUGH)
    directed = [one - 1 for one in found.current] + list(found.earlier) + [one.scale - 1 for one in outliers]
    return max(map(abs, directed)) <= _DIRECTED


def _explained(
    rows: torch.Tensor,
    got: torch.Tensor,
    earlier: torch.Tensor | None,
    looked_at: torch.Tensor,
    scale: float | None,
    rounding: float,
    outliers: Sequence[Outlier],
) -> Balance:
    """Which mixture of the contributions it is. scale: what most parameters agree on; None: the mixture shows it."""
    mine, goal = rows[:, looked_at], got[looked_at]
    before = None if earlier is None else earlier.detach().to(torch.float64)[:, looked_at]
    if scale is None:
        plain = measure(mine, goal, earlier=before, rcond=rounding).current
        counted = sorted(abs(one) for one in plain if abs(one) > 0.05 * max(map(abs, plain)))
        scale = counted[len(counted) // 2] if counted else 1.0
    scale = scale or 1.0
    found = measure(mine * scale, goal, earlier=None if before is None else before * scale, rcond=rounding)
    return Balance("unbalanced", scale, found.current, found.earlier, found.residual, found.determined, tuple(outliers))


def _rank(rows: torch.Tensor, rounding: float) -> int:
    values = torch.linalg.svdvals(rows)
    return int((values > rounding * values[0]).sum()) if len(values) and values[0] > 0 else 0
