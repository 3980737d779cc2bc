"""The coefficients say which micro-batches a gradient is made of, also where the question is hard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfix.measure.coefficients import measure

weights = st.lists(st.floats(-3, 3, allow_nan=False), min_size=1, max_size=8)
seeds = st.integers(0, 2**31)


def rows(count: int, elements: int, seed: int) -> torch.Tensor:
    return torch.randn(count, elements, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(weights, weights, seeds)
@settings(deadline=None)
def test_any_mixture_is_recovered(current: list[float], earlier: list[float], seed: int) -> None:
    every = rows(len(current) + len(earlier), 64, seed)
    own, old = every[: len(current)], every[len(current) :]
    consumed = torch.tensor(current, dtype=torch.float64) @ own + torch.tensor(earlier, dtype=torch.float64) @ old
    found = measure(own, consumed, earlier=old, rcond=1e-12)
    assert found.current == pytest.approx(current, abs=1e-9)
    assert found.earlier == pytest.approx(earlier, abs=1e-9)
    assert found.residual * float(consumed.norm()) < 1e-9  # what is unexplained: float64's rounding of the rows
    assert found.determined


@given(st.integers(1, 8), st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0]), seeds)
@settings(deadline=None)
def test_a_right_float32_gradient_is_right_however_alike_the_micro_batches_are(
    count: int, spread: float, seed: int
) -> None:
    alike = rows(1, 500, seed) + spread * rows(count, 500, seed + 1)
    found = measure(alike, alike.sum(0).to(torch.float32))
    assert found.current == pytest.approx([1.0] * count, abs=1e-2)
    assert found.relative_error < 1e-6
    assert found.residual < 1e-6


@given(st.sampled_from([1e-3, 1e-1, 1.0]), seeds)
@settings(deadline=None)
def test_a_dropped_micro_batch_is_seen_among_alike_ones(spread: float, seed: int) -> None:
    alike = rows(1, 500, seed) + spread * rows(4, 500, seed + 1)
    found = measure(alike, (alike[0] + alike[3]).to(torch.float32))
    assert found.current == pytest.approx([1, 0, 0, 1], abs=1e-3)


@given(st.floats(1e-12, 1e12), weights, seeds)
@settings(deadline=None)
def test_the_unit_of_the_gradient_does_not_matter(scale: float, current: list[float], seed: int) -> None:
    own = rows(len(current), 64, seed)
    consumed = torch.tensor(current, dtype=torch.float64) @ own
    assert measure(own * scale, consumed * scale).current == pytest.approx(measure(own, consumed).current, abs=1e-6)


def test_equal_micro_batches_share_what_is_missing_and_say_so() -> None:
    own = rows(1, 10, 0).repeat(2, 1)
    found = measure(own, own[0])
    assert found.current == pytest.approx([0.5, 0.5])
    assert not found.determined
    assert found.norm_ratio == pytest.approx(0.5)


def test_a_zero_micro_batch_keeps_its_right_coefficient_and_is_called_undetermined() -> None:
    own = rows(3, 10, 0)
    own[1] = 0
    found = measure(own, own[0])
    assert found.current == pytest.approx([1, 1, 0])
    assert not found.determined


def test_a_leak_from_an_earlier_window_is_named() -> None:
    own, old = rows(4, 50, 0), rows(4, 50, 1)
    found = measure(own, own.sum(0) + old[3], earlier=old)
    assert found.current == pytest.approx([1, 1, 1, 1])
    assert found.earlier == pytest.approx([0, 0, 0, 1], abs=1e-12)
    assert measure(own, own.sum(0) + old[3]).residual > 0.3


def test_no_micro_batches_expect_a_zero_gradient() -> None:
    right = measure(torch.zeros(0, 5), torch.zeros(5))
    assert (right.current, right.relative_error, right.cosine, right.norm_ratio) == ((), 0.0, 1.0, 1.0)
    wrong = measure(torch.zeros(0, 5), torch.ones(5))
    assert (wrong.relative_error, wrong.cosine, wrong.norm_ratio, wrong.residual) == (math.inf, 0.0, math.inf, 1.0)


def test_zero_gradients_have_defined_answers() -> None:
    nothing = measure(torch.zeros(3, 5), torch.zeros(5))
    assert nothing.current == (1.0, 1.0, 1.0)
    assert (nothing.relative_error, nothing.cosine, nothing.norm_ratio, nothing.residual) == (0.0, 1.0, 1.0, 0.0)
    lost = measure(rows(3, 5, 0), torch.zeros(5))
    assert lost.current == pytest.approx([0, 0, 0], abs=1e-9)
    assert (lost.relative_error, lost.cosine, lost.norm_ratio) == (1.0, 0.0, 0.0)
    assert measure(torch.zeros(2, 0), torch.zeros(0)).current == (1.0, 1.0)


@pytest.mark.parametrize(
    ("micro_batches", "consumed", "earlier", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(4), None, r"micro_batches must have shape \[any number, 4\].*not \[2, 3\]"),
        (torch.zeros(3), torch.zeros(3), None, r"micro_batches must have shape .*not \[3\]"),
        (torch.zeros(2, 3), torch.zeros(1, 3), None, r"consumed gradient must have shape \[elements\], not \[1, 3\]"),
        (torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 2), r"earlier must have shape .*not \[2, 2\]"),
        (torch.zeros(2, 3), torch.tensor([1.0, math.nan, math.inf]), None, "consumed gradient: 2 of 3 values are NaN"),
        (torch.full((2, 3), math.inf), torch.zeros(3), None, "micro_batches: 6 of 6 values"),
    ],
)
def test_what_cannot_be_measured_is_a_clear_error(
    micro_batches: torch.Tensor, consumed: torch.Tensor, earlier: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        measure(micro_batches, consumed, earlier=earlier)
