"""A window's gradient against what its micro-batches contributed: balanced, or what is missing, doubled or stale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfix.measure.balance import balance

PARAMETERS, ELEMENTS = 6, 50


def window(*, backwards=4, seed=0, alike=False):
    """Contributions [backwards, elements], and the parameter of each element."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1 if alike else backwards, PARAMETERS * ELEMENTS)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    return rows.expand(backwards, -1).contiguous(), torch.arange(PARAMETERS).repeat_interleave(ELEMENTS)


def mixed(rows, coefficients, scale=1.0):
    return scale * (torch.tensor(coefficients, dtype=torch.float64) @ rows)


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(1e-6, 1e6), backwards=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_window_that_holds_every_micro_batch_once_balances_at_any_scale(scale, backwards, seed):
    rows, parameters = window(backwards=backwards, seed=seed)
    found = balance(rows, mixed(rows, [1.0] * backwards, scale).float(), parameters)
    assert (found.verdict, found.outliers) == ("balanced", ())
    assert found.scale == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize(
    "coefficients", [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 2], [1, 1, 1, 0.25], [1, -1, 1, 1]], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_what_was_dropped_doubled_or_mis_scaled_is_named(coefficients, scale):
    rows, parameters = window()
    found = balance(rows, mixed(rows, coefficients, scale), parameters)
    assert found.verdict == "unbalanced"
    assert found.coefficients == pytest.approx(coefficients, abs=1e-6)
    assert found.residual < 1e-9


def test_what_is_left_of_an_earlier_window_is_named():
    rows, parameters = window()
    before, _ = window(seed=1, backwards=2)
    found = balance(rows, mixed(rows, [1] * 4) + before[1], parameters, earlier=before)
    assert found.verdict == "unbalanced"
    assert found.coefficients == pytest.approx([1] * 4, abs=1e-6)
    assert found.earlier == pytest.approx([0, 1], abs=1e-6)


def test_a_parameter_that_lost_its_window_is_named_and_the_others_are_not():
    rows, parameters = window()
    got = mixed(rows, [1] * 4)
    got[parameters == 2] = 0
    found = balance(rows, got, parameters)
    assert [one.parameter for one in found.outliers] == [2]
    assert found.outliers[0].scale == 0
    assert found.scale == pytest.approx(1)
    assert found.coefficients == pytest.approx([0] * 4, abs=1e-6)


def test_a_parameter_that_no_micro_batch_used_may_hold_nothing():
    rows, parameters = window()
    rows[:, parameters == 3] = 0
    assert balance(rows, mixed(rows, [1] * 4), parameters).verdict == "balanced"
    got = mixed(rows, [1] * 4)
    got[parameters == 3] = 1
    assert [one.parameter for one in balance(rows, got, parameters).outliers] == [3]


def test_noise_is_left_over():
    rows, parameters = window()
    other = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = balance(rows, mixed(rows, [1] * 4) + other, parameters)
    assert found.verdict == "unbalanced"
    assert found.residual > 0.3


def test_equal_micro_batches_cannot_show_which_of_them_is_missing():
    rows, parameters = window(alike=True)
    found = balance(rows, mixed(rows, [1, 0, 0, 1]), parameters)
    assert (found.verdict, found.determined) == ("unclear", False)
    assert found.scale == pytest.approx(0.5)


def test_sums_of_16_bits_are_no_error_where_16_bits_are_what_was_asked_for():
    rows, parameters = window(backwards=8)
    total = torch.zeros(rows.shape[1], dtype=torch.bfloat16)
    for row in rows:
        total += row.bfloat16()
    assert balance(rows, total, parameters, rounding=2e-2).verdict == "balanced"
    assert balance(rows, total, parameters).rough > 0


def test_sums_of_16_bits_where_more_was_asked_for_balance_and_their_roughness_is_told():
    rows, parameters = window()
    rows = rows.bfloat16()
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    found = balance(rows, total, parameters)
    assert (found.verdict, found.outliers) == ("balanced", ())
    assert 1e-4 < found.rough < 0.03


@pytest.mark.parametrize("coefficients", [[1, 1, 1, 1.02], [1, 1, 0.98, 1]], ids=str)
def test_a_small_error_with_a_direction_is_no_roughness(coefficients):
    rows, parameters = window()
    found = balance(rows, mixed(rows, coefficients), parameters)
    assert found.verdict == "unbalanced"
    assert found.coefficients == pytest.approx(coefficients, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_clipping_by_value_balances_and_what_is_lost_under_it_does_not(scale):
    rows, parameters = window()
    found = balance(rows, mixed(rows, [1] * 4, scale).clamp(-0.3, 0.3).float(), parameters)
    assert (found.verdict, found.clipped_at) == ("balanced", pytest.approx(0.3))
    assert found.scale == pytest.approx(scale)
    assert balance(rows, mixed(rows, [1, 0, 1, 1], scale).clamp(-0.3, 0.3), parameters).verdict == "unbalanced"


def test_an_overflow_is_an_error_not_a_verdict():
    rows, parameters = window()
    with pytest.raises(ValueError, match="NaN or infinite"):
        balance(rows, torch.full((rows.shape[1],), float("inf")), parameters)


def test_shapes_that_do_not_fit_are_named():
    rows, parameters = window()
    with pytest.raises(ValueError, match=r"not \[4, 300\], \[299\] and \[300\]"):
        balance(rows, torch.zeros(299), parameters)
