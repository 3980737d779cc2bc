"""The compiled loop gives torch's bits for every pattern, size and address, and one float64 sum that tells the rest."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gradcopy.native import building
from trainfix.gradcopy import native
from trainfix.gradcopy.arithmetic import TorchAdder
from trainfix.gradcopy.segments import Segment

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCK, LANES = 4096, 16  # of native/loop.c
BORDERS = [0, 1, LANES - 1, LANES, LANES + 1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + LANES + 1, 3 * BLOCK + 5]

EVERY_SIXTEEN_BITS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
LARGEST = torch.finfo(torch.float32).max
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754942e-38, LARGEST, -LARGEST, 1.0]


def bits(tensor):
    """The patterns, so that -0.0 is not 0.0 and a NaN is itself."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).clone()


def assert_same(got, wanted):
    """Bit for bit; a sum that is not a number may carry any payload, on which processors differ."""
    numbers = ~wanted.isnan()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(bits(got)[numbers], bits(wanted)[numbers])


def added(adder, destination, gradient, *, first):
    """What stands in a copy of `destination` afterwards, and the sum of squares."""
    into, squares = destination.clone(), torch.full((1,), -1.0, dtype=torch.float64)
    adder.add([Segment(0, into, gradient, first)], squares)
    return into, squares.item()


def in_the_documented_order(stored):
    """Lanes within a block one after the other, the lanes by halves, then the blocks."""
    total = 0.0
    for begin in range(0, stored.numel(), BLOCK):
        block = stored[begin : begin + BLOCK].double().numpy() ** 2
        rows = np.concatenate([block, np.zeros(-len(block) % LANES)]).reshape(-1, LANES)
        lanes = np.add.accumulate(rows, axis=0)[-1]
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += float(lanes[0])
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_sixteen_bits_is_stored_as_torch_widens_it(adder, dtype):
    gradient = EVERY_SIXTEEN_BITS.view(dtype)
    stored, _ = added(adder, torch.full((1 << 16,), math.nan), gradient, first=True)
    assert torch.equal(bits(stored), bits(gradient.float()))


def test_every_pattern_of_fp16_is_stored_as_numpy_widens_it(adder):
    patterns = EVERY_SIXTEEN_BITS.numpy().view(np.float16)
    stored, _ = added(adder, torch.empty(1 << 16), torch.from_numpy(patterns), first=True)
    assert_same(stored, torch.from_numpy(patterns.astype(np.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", SPECIAL)
def test_every_pattern_of_sixteen_bits_is_added_as_torch_adds_it(adder, dtype, before):
    gradient, destination = EVERY_SIXTEEN_BITS.view(dtype), torch.full((1 << 16,), before)
    assert_same(added(adder, destination, gradient, first=False)[0], destination + gradient.float())


def test_every_pair_of_special_float32_is_added_and_stored_as_torch_does_it(adder):
    destination, gradient = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T.contiguous()
    assert_same(added(adder, destination, gradient, first=False)[0], destination + gradient)
    stored, _ = added(adder, destination, gradient, first=True)
    assert torch.equal(bits(stored), bits(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_does_not_depend_on_subnormals_being_flushed(adder, dtype):
    gradient = EVERY_SIXTEEN_BITS.view(dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        stored, _ = added(adder, torch.empty(1 << 16), gradient, first=True)
    finally:
        torch.set_flush_denormal(False)
    assert_same(stored, gradient.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", BORDERS)
def test_a_window_has_the_bits_of_the_torch_version_around_every_border(adder, dtype, elements):
    torch.manual_seed(elements)
    parts = [torch.randn(elements).to(dtype) for _ in range(3)]
    ours, theirs = torch.full((elements,), math.nan), torch.full((elements,), math.nan)
    for number, part in enumerate(parts):
        ours, sum_ours = added(adder, ours, part, first=number == 0)
        theirs, sum_theirs = added(TorchAdder(), theirs, part, first=number == 0)
        assert torch.equal(bits(ours), bits(theirs))
        assert sum_ours == pytest.approx(sum_theirs, rel=1e-12, abs=0)
        assert sum_ours == pytest.approx(float(np.sum(ours.numpy().astype(np.float64) ** 2)), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", BORDERS)
def test_nothing_beyond_the_segment_is_written(adder, dtype, elements):
    around = torch.full((elements + 64,), 7.0)
    adder.add([Segment(0, around[32 : 32 + elements], torch.ones(elements, dtype=dtype), False)])
    assert around[:32].tolist() + around[32 + elements :].tolist() == [7.0] * 64
    assert around[32 : 32 + elements].tolist() == [8.0] * elements


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd_bytes", [0, 1], ids=["aligned to elements", "aligned to nothing"])
@pytest.mark.parametrize(("to", "start"), [(0, 1), (1, 0), (3, 5), (7, 2)])
def test_addresses_need_no_alignment(adder, dtype, to, start, odd_bytes):
    elements = BLOCK + 37
    gradient, before = torch.randn(elements).to(dtype), torch.randn(elements)

    def placed(values, offset):
        memory, begin = np.zeros(1 << 16, np.uint8), offset * values.element_size() + odd_bytes
        memory[begin : begin + values.nbytes] = values.view(torch.uint8).numpy()
        return torch.frombuffer(memory, dtype=values.dtype, count=elements, offset=begin)

    destination = placed(before, to)
    squares = torch.zeros(1, dtype=torch.float64)
    adder.add([Segment(0, destination, placed(gradient, start), False)], squares)
    wanted, sum_of_squares = added(adder, before, gradient, first=False)
    assert torch.equal(bits(destination), bits(wanted))
    assert squares.item() == sum_of_squares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", BORDERS)
@pytest.mark.parametrize("first", [True, False])
def test_squares_are_summed_in_the_documented_order(adder, dtype, elements, first):
    """So they are the same on every processor, whatever the length of its vectors."""
    torch.manual_seed(elements)
    stored, squares = added(adder, torch.randn(elements), torch.randn(elements).to(dtype), first=first)
    assert squares == in_the_documented_order(stored)


def test_squares_stay_close_over_many_blocks(adder):
    """Against a sum that is rounded once."""
    stored, squares = added(adder, torch.empty(1 << 20), torch.randn(1 << 20), first=True)
    assert squares == pytest.approx(math.fsum((stored.double() ** 2).tolist()), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, LANES, BLOCK - 1, BLOCK, BLOCK + 6])
def test_squares_are_not_finite_where_one_element_is_not(adder, dtype, bad, place):
    gradient = torch.ones(BLOCK + 7, dtype=dtype)
    gradient[place] = bad
    assert not math.isfinite(added(adder, torch.ones(BLOCK + 7), gradient, first=False)[1])


def test_squares_of_the_largest_float32_are_finite(adder):
    """In float32 a single one of them would overflow."""
    largest = torch.full((BLOCK + 1,), LARGEST)
    stored, squares = added(adder, torch.zeros(BLOCK + 1), largest, first=False)
    assert stored.isfinite().all()
    assert math.isfinite(squares)


def test_a_sum_that_overflows_shows_in_the_squares(adder):
    largest = torch.full((3,), LARGEST)
    stored, squares = added(adder, largest, largest, first=False)
    assert stored.isinf().all()
    assert squares == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_stretches_may_be_added_by_several_threads_at_once(adder, dtype):
    cuts, gradient, before = [BLOCK, 3, 2 * BLOCK + 1, 50_000], torch.randn(62_292).to(dtype), torch.randn(62_292)
    cuts[-1] = len(before) - sum(cuts[:-1])
    destination = before.clone()
    pairs = zip(destination.split(cuts), gradient.split(cuts), strict=True)
    threads = [threading.Thread(target=adder.add, args=([Segment(0, *pair, False)],)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(bits(destination), bits(before + gradient.float()))


# A build that names another compiler takes the plain body; one for this very processor has its longest vectors and FMA.
@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-D__clang__", "-march=native"])
def test_every_body_of_the_loop_gives_the_same_bits(adder, tmp_path: Path, flag):
    with building.found(building.build(tmp_path, flag)):
        other = native.adder()
    assert isinstance(other, native.NativeAdder)
    torch.manual_seed(0)
    for dtype in DTYPES:
        for first in (True, False):
            destination, gradient = torch.randn(3 * BLOCK + 21), torch.randn(3 * BLOCK + 21).to(dtype)
            ours, theirs = (added(one, destination, gradient, first=first) for one in (adder, other))
            assert torch.equal(bits(ours[0]), bits(theirs[0]))
            assert ours[1] == theirs[1]
    for dtype in (torch.bfloat16, torch.float16):
        gradient = EVERY_SIXTEEN_BITS.view(dtype)
        assert_same(added(other, torch.empty(1 << 16), gradient, first=True)[0], gradient.float())
