"""Carrying gradients to the host: the sums are those of float32 in window order, bit for bit, one chunk at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainfix import gradcopy
from trainfix.gradcopy import CHUNK_ELEMENTS, Segment, accumulate, norm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BORDERS = [0, 1, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1, 2 * CHUNK_ELEMENTS + 3]


def gradients(elements, dtype, *, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(elements, generator=generator).to(dtype) for _ in range(count)]


def float32_sum(parts):
    """One after the other, in float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def window(parts, destination):
    for number, part in enumerate(parts):
        accumulate([Segment(destination, part, number == 0)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", BORDERS)
def test_a_window_is_the_float32_sum_in_its_order_bit_for_bit(elements, dtype):
    parts = gradients(elements, dtype)
    destination = torch.full((elements,), math.nan)  # what an earlier window left must not matter
    window(parts, destination)
    assert torch.equal(destination, float32_sum(parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_window_is_kept(dtype):
    """A sum of float32 depends on the order: the same parts backwards give other bits."""
    parts = gradients(10_000, dtype, count=8)
    forwards, backwards = torch.empty(10_000), torch.empty(10_000)
    window(parts, forwards)
    window(parts[::-1], backwards)
    assert torch.equal(forwards, float32_sum(parts))
    assert torch.equal(backwards, float32_sum(parts[::-1]))
    assert dtype is not torch.float32 or not torch.equal(forwards, backwards)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_not_summed_in_their_own_type(dtype):
    parts = gradients(10_000, dtype, count=8)
    destination = torch.empty(10_000)
    window(parts, destination)
    own = parts[0].clone()
    for part in parts[1:]:
        own += part
    assert not torch.equal(destination, own.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_masters_take_the_sum_in_their_own_type(dtype):
    parts = gradients(1000, dtype)
    destination = torch.empty(1000, dtype=dtype)
    window(parts, destination)
    assert torch.equal(destination, parts[0] + parts[1] + parts[2])


# A small chunk, so that a few hundred elements cross many borders.
@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    chunk=st.integers(1, 70),
    count=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_segments_of_any_sizes_are_summed_each_in_its_own_place(sizes, chunk, count, dtype, seed):
    total = sum(sizes)
    parts = gradients(total, dtype, count=count, seed=seed)
    flat = torch.full((total,), math.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradcopy, "CHUNK_ELEMENTS", chunk)
        for number, part in enumerate(parts):
            pairs = zip(flat.split(sizes), part.split(sizes), strict=True)
            accumulate([Segment(into, piece, number == 0) for into, piece in pairs])
        assert float(norm(flat)) == pytest.approx(float(flat.double().norm()), rel=1e-12)
    assert torch.equal(flat, float32_sum(parts))


def test_segments_of_one_call_may_begin_and_go_on_with_a_window():
    first, later = torch.tensor([1.0, 2.0]), torch.tensor([10.0])
    accumulate([Segment(first, torch.tensor([3.0, 4.0]), True), Segment(later, torch.tensor([5.0]), False)])
    assert first.tolist() == [3.0, 4.0]
    assert later.tolist() == [15.0]


def test_no_segments_are_nothing_to_do():
    accumulate([])


def test_the_gradient_is_left_as_it_was():
    gradient = torch.ones(5, dtype=torch.bfloat16)
    window([gradient, gradient], torch.empty(5))
    assert gradient.tolist() == [1] * 5


def test_unequal_lengths_are_an_error_that_leaves_everything_untouched():
    good, bad = torch.zeros(4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"shape \(3,\) cannot take a gradient of shape \(2,\)"):
        accumulate([Segment(good, torch.ones(4), True), Segment(bad, torch.ones(2), True)])
    assert good.tolist() == [0] * 4
    assert bad.tolist() == [0] * 3


def test_a_gradient_of_one_element_is_not_spread_over_many():
    destination = torch.zeros(4)
    with pytest.raises(ValueError, match=r"shape \(4,\) cannot take a gradient of shape \(1,\)"):
        accumulate([Segment(destination, torch.ones(1), True)])
    assert destination.tolist() == [0] * 4


@pytest.mark.parametrize("elements", BORDERS)
def test_the_norm_is_that_of_float64(elements):
    (gradient,) = gradients(elements, torch.float32, count=1)
    assert norm(gradient).dtype is torch.float64
    assert float(norm(gradient)) == pytest.approx(float(gradient.double().norm()), rel=1e-12, abs=0)


def test_the_norm_does_not_overflow_where_float32_would():
    assert float(norm(torch.full((4,), 3e38))) == pytest.approx(6e38, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 6])
def test_one_element_that_is_not_finite_shows_in_the_norm(bad, place):
    gradient = torch.ones(CHUNK_ELEMENTS + 7)
    gradient[place] = bad
    assert not norm(gradient).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_in_one_micro_batch_stays_in_the_sum(dtype, bad):
    parts = gradients(10, dtype)
    parts[0][3] = bad
    destination = torch.empty(10)
    window(parts, destination)
    assert not destination[3].isfinite()
    assert destination.isfinite().sum() == 9


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operation made anew, not as a view or in place."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.bytes.append(leaf.untyped_storage().nbytes())
        return result


CHUNK_BYTES = 4 * CHUNK_ELEMENTS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
def test_nothing_larger_than_a_chunk_is_allocated(dtype, first):
    elements = 5 * CHUNK_ELEMENTS + 1
    gradient, destination = torch.ones(elements, dtype=dtype), torch.zeros(elements)
    with Allocations() as made:
        accumulate([Segment(destination, gradient, first)])
        norm(destination)
    assert max(made.bytes) <= CHUNK_BYTES


def test_the_counter_sees_the_copy_that_chunks_avoid():
    elements = 5 * CHUNK_ELEMENTS + 1
    with Allocations() as made:
        torch.zeros(elements).add_(torch.ones(elements, dtype=torch.bfloat16).to(torch.float32))
    assert max(made.bytes) > CHUNK_BYTES


def test_storing_and_adding_float32_allocates_nothing():
    gradient, destination = torch.ones(CHUNK_ELEMENTS + 1), torch.zeros(CHUNK_ELEMENTS + 1)
    with Allocations() as made:
        window([gradient, gradient], destination)
    assert sum(made.bytes) == 0
