"""Micro-batch coefficients: the weight with which each micro-batch's gradient reached the optimizer.

Plain torch arithmetic in float64. Only torch is imported, and nothing of trainfix, so that an experiment can use this
module in an interpreter in which trainfix must not be active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Coefficients:
    """What a consumed gradient is made of.

    `current`: one coefficient per micro-batch of this window, 1 = right, 0 = dropped.
    `earlier`: one per micro-batch of the earlier windows, 0 = right.
    `relative_error`: |consumed - expected| / |expected|; expected is the sum of this window's micro-batches.
    `cosine`, `norm_ratio`: between consumed and expected, 1 = right.
    `residual`: |part of consumed that no mixture of the given micro-batches explains| / |consumed|, 0 = explained.
    `determined`: False when the micro-batches are too alike (or some are zero) for every single coefficient to follow
    from the data; the coefficients are then the smallest departure from right that explains the consumed gradient.

    Zero vectors: where expected and consumed are both zero, nothing is wrong (error 0, cosine 1, ratio 1).
    Where only expected is zero, error and ratio are infinite and the cosine is 0; where only consumed is, 1, 0 and 0.
    """

    current: tuple[float, ...]
    earlier: tuple[float, ...]
    relative_error: float
    cosine: float
    norm_ratio: float
    residual: float
    determined: bool


def measure(
    micro_batches: torch.Tensor,
    consumed: torch.Tensor,
    *,
    earlier: torch.Tensor | None = None,
    rcond: float = 1e-6,
) -> Coefficients:
    """Explain `consumed` [elements] by the reference gradients `micro_batches` [micro-batches, elements].

    Row k of `micro_batches` is what micro-batch k should add to the gradient (already divided by the number of
    accumulation steps where the loss is), so that the right coefficients are all 1. `earlier` [any, elements] holds the
    rows of earlier windows, whose right coefficients are 0. Zero rows or zero micro-batches are allowed.

    What is solved for is the departure from right, the least-squares solution of smallest norm of
    `departure @ rows = consumed - expected`. Where the data leave a coefficient open (a micro-batch with zero gradient,
    two equal ones), it therefore stays as close to its right value as the data allow, and a right gradient always gives
    exactly right coefficients, however alike the micro-batches are.

    `rcond` cuts nearly collinear directions: a combination of rows whose singular value is below `rcond` times the
    largest counts as not observable, because the coefficients along it would be the rounding error of `consumed`
    divided by that singular value. The default 1e-6 suits a consumed gradient in float32 (rounding 6e-8); use about
    1e-2 for one that was rounded to bfloat16, down to 1e-12 for float64.

    Raises ValueError, naming the shape, when the shapes do not fit together or a value is not finite.
    """
    rows, own = _stack(micro_batches, consumed, earlier)
    got = _finite("the consumed gradient", consumed)
    expected = rows[:own].sum(0)
    departure, determined = _smallest_solution(rows, got - expected, rcond)
    right = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    right[:own] = 1.0
    coefficients = right + departure
    unexplained = _norm(got - coefficients @ rows)
    size, want = _norm(got), _norm(expected)
    return Coefficients(
        current=tuple(coefficients[:own].tolist()),
        earlier=tuple(coefficients[own:].tolist()),
        relative_error=_ratio(_norm(got - expected), want, both_zero=0.0),
        cosine=_cosine(got, expected, size=size, want=want),
        norm_ratio=_ratio(size, want, both_zero=1.0),
        residual=unexplained / size if size > 0 else 0.0,
        determined=determined,
    )


def _stack(
    micro_batches: torch.Tensor, consumed: torch.Tensor, earlier: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """All rows in float64 [micro-batches + earlier ones, elements], and how many of them are this window's."""
    if consumed.dim() != 1:
        raise ValueError(f"the consumed gradient must have shape [elements], not {list(consumed.shape)}")
    parts = [("micro_batches", micro_batches)] + ([] if earlier is None else [("earlier", earlier)])
    for name, matrix in parts:
        if matrix.dim() != 2 or matrix.shape[1] != consumed.numel():
            wanted = f"[any number, {consumed.numel()}] to match the consumed gradient"
            raise ValueError(f"{name} must have shape {wanted}, not {list(matrix.shape)}")
    return torch.cat([_finite(name, matrix) for name, matrix in parts]), len(micro_batches)


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or ValueError when it holds NaN or infinity."""
    exact = tensor.detach().to(torch.float64)
    bad = int((~torch.isfinite(exact)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {exact.numel()} values are NaN or infinite, so no coefficients exist")
    return exact


def _smallest_solution(rows: torch.Tensor, target: torch.Tensor, rcond: float) -> tuple[torch.Tensor, bool]:
    """x of smallest norm that minimises |x @ rows - target|, and whether the rows determine every element of x."""
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.float64, device=rows.device), len(rows) == 0
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    kept = values > rcond * values[0]
    if not bool(kept.any()):
        return torch.zeros(len(rows), dtype=torch.float64, device=rows.device), False
    solution = left[:, kept] @ ((right[kept] @ target) / values[kept])
    return solution, int(kept.sum()) == len(rows)


def _norm(vector: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))


def _ratio(value: float, reference: float, *, both_zero: float) -> float:
    if reference > 0:
        return value / reference
    return both_zero if value == 0 else float("inf")


def _cosine(got: torch.Tensor, expected: torch.Tensor, *, size: float, want: float) -> float:
    if size > 0 and want > 0:
        return max(-1.0, min(1.0, float(torch.dot(got / size, expected / want))))
    return 1.0 if size == want else 0.0
