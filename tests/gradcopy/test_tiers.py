"""Every tier carries the float32 sum in window order to the masters, bit for bit, on the host as the device."""

from __future__ import annotations

import gc
import itertools
import math
import os
import signal
import threading
import time
import weakref
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainfix.gradcopy import Carrier, Segment, Wish, choice, rehearsal, squares_on_host
from trainfix.gradcopy.arithmetic import CHUNK_ELEMENTS, TorchAdder
from trainfix.gradcopy.queues import HostDevice

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BORDERS = [0, 1, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1, 2 * CHUNK_ELEMENTS + 3]
TIERS = ["torch", "host-add", "ring", "resident"]


def gradients(elements, dtype, *, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(elements, generator=generator).to(dtype) for _ in range(count)]


def float32_sum(parts):
    """One after the other, in float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def square(values):
    return float(values.double().square().sum())


@pytest.fixture(params=TIERS)
def tier(request):
    return request.param


@pytest.fixture
def small_slots(monkeypatch):
    """A few elements fill a slot."""
    monkeypatch.setattr(choice, "ELEMENTS", 16)


# The sum on the host.


def window(parts, destination):
    for number, part in enumerate(parts):
        TorchAdder().add([Segment(0, destination, part, number == 0)])


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


def test_the_gradient_is_left_as_it_was():
    gradient = torch.ones(5, dtype=torch.bfloat16)
    window([gradient, gradient], torch.empty(5))
    assert gradient.tolist() == [1] * 5


@pytest.mark.parametrize("elements", BORDERS)
def test_the_sum_of_squares_is_that_of_float64(elements):
    (gradient,) = gradients(elements, torch.float32, count=1)
    squares = torch.full((1,), math.nan, dtype=torch.float64)
    TorchAdder().add([Segment(0, torch.empty(elements), gradient, True)], squares)
    assert squares.item() == pytest.approx(square(gradient), rel=1e-12, abs=0)
    assert squares_on_host({7: gradient}) == {7: pytest.approx(square(gradient), rel=1e-12, abs=0)}


def test_no_slices_have_no_squares():
    assert squares_on_host({}) == {}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 6])
def test_one_element_that_is_not_finite_shows_in_the_sum_of_squares(bad, place):
    gradient = torch.ones(CHUNK_ELEMENTS + 7)
    gradient[place] = bad
    assert not math.isfinite(squares_on_host({0: gradient})[0])


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
    squares = torch.zeros(1, dtype=torch.float64)
    with Allocations() as made:
        TorchAdder().add([Segment(0, destination, gradient, first)], squares)
        squares_on_host({0: destination})
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


# A window's way through each tier.


class MicroBatch(NamedTuple):
    keys: list[int]
    border: int  # between its two buckets
    dtype: torch.dtype
    last: bool


@st.composite
def micro_batches(draw, keys):
    chosen = draw(st.lists(st.integers(0, keys - 1), unique=True))
    return MicroBatch(
        chosen, draw(st.integers(0, len(chosen))), draw(st.sampled_from(DTYPES)), last=draw(st.booleans())
    )


@st.composite
def trainings(draw):
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    windows = st.lists(micro_batches(len(sizes)), min_size=1, max_size=4)
    return sizes, draw(st.lists(windows, min_size=1, max_size=3))


@settings(max_examples=40, deadline=None)
@given(
    training=trainings(),
    elements=st.integers(1, 20).map(lambda half: 2 * half),
    budget=st.none() | st.integers(0, 500),
    overlap=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_all_tiers_give_the_bits_of_the_float32_sum(training, elements, budget, overlap, seed):
    sizes, windows = training
    flats = {name: torch.full((sum(sizes),), math.nan) for name in TIERS}
    right = list(torch.full((sum(sizes),), math.nan).split(sizes))
    generator = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "ELEMENTS", elements)
        carriers = {name: Carrier([flat], CPU, Wish(name, budget, overlap)) for name, flat in flats.items()}
    assert [carrier.tier for carrier in carriers.values()] == TIERS
    for batches in windows:
        touched = set()
        for batch in batches:
            values = {key: torch.randn(sizes[key], generator=generator).to(batch.dtype) for key in batch.keys}
            for name, carrier in carriers.items():
                masters = flats[name].split(sizes)
                for keys in (batch.keys[: batch.border], batch.keys[batch.border :]):
                    bucket = [Segment(key, masters[key], values[key].clone(), key not in touched) for key in keys]
                    carrier.accumulate(bucket, last=batch.last)
                    for one in bucket:
                        one.gradient.fill_(math.nan)
            for key, value in values.items():
                right[key] = right[key] + value.float() if key in touched else value.float()
            touched |= set(batch.keys)
        for name, carrier in carriers.items():
            masters = flats[name].split(sizes)
            squares = carrier.squares(dict(enumerate(masters)))
            assert all(
                torch.equal(master.isnan(), wanted.isnan()) for master, wanted in zip(masters, right, strict=True)
            )
            for key in touched:
                assert torch.equal(masters[key], right[key]), name
                assert squares[key] == pytest.approx(square(right[key]), rel=1e-12), name
            carrier.renew()


def carry(carrier, parts, masters, *, last=True):
    """A whole window of one bucket per micro-batch: `parts` [micro-batch][key]."""
    for number, here in enumerate(parts):
        bucket = [Segment(key, masters[key], gradient, number == 0) for key, gradient in enumerate(here)]
        carrier.accumulate(bucket, last=last and number == len(parts) - 1)


SIZES = [40, 3, 21]


def bfloat16_window(seed=0, *, micro_batches=3):
    (flat,) = gradients(sum(SIZES) * micro_batches, torch.bfloat16, count=1, seed=seed)
    return [list(part.split(SIZES)) for part in flat.split(sum(SIZES))]


def sums(parts):
    return torch.cat([float32_sum(list(of_one_key)) for of_one_key in zip(*parts, strict=True)])


@pytest.mark.usefixtures("small_slots")
def test_buckets_of_one_call_may_begin_and_go_on_with_a_window(tier):
    flat = torch.tensor([1.0, 2.0, 10.0])
    carrier = Carrier([flat], CPU, Wish(tier))
    first, later = flat.split([2, 1])
    carrier.accumulate(
        [Segment(0, first, torch.tensor([3.0, 4.0]), True), Segment(1, later, torch.tensor([5.0]), False)]
    )
    carrier.wait()
    assert flat.tolist() == [3.0, 4.0, 15.0]


def test_no_segments_are_nothing_to_do(tier):
    carrier = Carrier([torch.zeros(3)], CPU, Wish(tier))
    carrier.accumulate([], last=True)
    assert carrier.squares({}) == {}
    carrier.renew()


@pytest.mark.usefixtures("small_slots")
def test_squares_taken_on_the_way_are_those_read_from_the_host(tier):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = dict(enumerate(flat.split(SIZES)))
    carrier = Carrier([flat], CPU, Wish(tier))
    for _ in range(2):
        carry(carrier, parts, masters)
        assert carrier.squares(masters) == {key: pytest.approx(square(one), rel=1e-12) for key, one in masters.items()}
        carrier.renew()
        carry(carrier, parts, masters, last=False)
        assert carrier.squares(masters) == {key: pytest.approx(square(one), rel=1e-12) for key, one in masters.items()}
        carrier.renew()


@pytest.mark.usefixtures("small_slots")
def test_squares_of_the_last_gradients_are_not_read_again_from_the_host(tier, monkeypatch):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = dict(enumerate(flat.split(SIZES)))
    carrier = Carrier([flat], CPU, Wish(tier))
    carry(carrier, parts, masters)
    carrier.wait()
    flat.zero_()
    assert all(carrier.squares(masters).values())


@pytest.mark.usefixtures("small_slots")
def test_a_gradient_behind_the_last_counts_in_the_squares(tier):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = dict(enumerate(flat.split(SIZES)))
    carrier = Carrier([flat], CPU, Wish(tier))
    for _ in range(2):
        carry(carrier, parts, masters)
        carrier.accumulate([Segment(0, masters[0], torch.full((SIZES[0],), 9.0), False)])
        assert carrier.squares(masters)[0] == pytest.approx(
            square(float32_sum([sums(parts)[:40], torch.full((40,), 9.0)]))
        )
        carrier.renew()


@pytest.mark.usefixtures("small_slots")
@pytest.mark.parametrize("last", [True, False])
def test_one_element_that_is_not_finite_shows_in_its_key_alone(tier, last):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    parts[1][0][17] = math.inf
    masters = dict(enumerate(flat.split(SIZES)))
    carrier = Carrier([flat], CPU, Wish(tier))
    for _ in range(2):
        carry(carrier, parts, masters, last=last)
        assert [math.isfinite(value) for value in carrier.squares(masters).values()] == [False, True, True]
        carrier.renew()


def test_the_sum_of_squares_does_not_overflow_where_float32_would(tier):
    flat = torch.empty(4)
    carrier = Carrier([flat], CPU, Wish(tier))
    carrier.accumulate([Segment(0, flat, torch.full((4,), 3e38), True)], last=True)
    assert carrier.squares({0: flat})[0] == pytest.approx(3.6e77, rel=1e-6)


def test_unequal_lengths_are_an_error_that_leaves_everything_untouched(tier):
    flat = torch.zeros(7)
    good, bad = flat.split([4, 3])
    carrier = Carrier([flat], CPU, Wish(tier))
    with pytest.raises(ValueError, match=r"shape \(3,\) cannot take a gradient of shape \(2,\)"):
        carrier.accumulate([Segment(0, good, torch.ones(4), True), Segment(1, bad, torch.ones(2), True)])
    carrier.wait()
    assert flat.tolist() == [0] * 7


def test_a_gradient_of_one_element_is_not_spread_over_many(tier):
    flat = torch.zeros(4)
    carrier = Carrier([flat], CPU, Wish(tier))
    with pytest.raises(ValueError, match=r"shape \(4,\) cannot take a gradient of shape \(1,\)"):
        carrier.accumulate([Segment(0, flat, torch.ones(1), True)])
    carrier.wait()
    assert flat.tolist() == [0] * 4


def test_two_gradients_for_one_key_are_an_error_that_leaves_everything_untouched(tier):
    flat = torch.zeros(4)
    carrier = Carrier([flat], CPU, Wish(tier))
    with pytest.raises(ValueError, match="two gradients of one bucket go to the same slice"):
        carrier.accumulate([Segment(0, flat, torch.ones(4), True), Segment(0, flat, torch.ones(4), False)])
    carrier.wait()
    assert flat.tolist() == [0] * 4


@pytest.mark.usefixtures("small_slots")
def test_a_window_that_is_given_up_leaves_nothing_in_the_next(tier):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = flat.split(SIZES)
    carrier = Carrier([flat], CPU, Wish(tier))
    for _ in range(2):
        carry(carrier, bfloat16_window(seed=5), masters)
        carrier.renew()
        carry(carrier, parts, masters, last=False)
        carrier.wait()
        assert torch.equal(flat, sums(parts))
        carrier.renew()


@pytest.mark.usefixtures("small_slots")
def test_what_goes_on_after_a_renewal_is_added_to_what_stands_in_the_masters(tier):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = flat.split(SIZES)
    carrier = Carrier([flat], CPU, Wish(tier))
    carry(carrier, parts[:2], masters)
    carrier.wait()
    carrier.renew()
    carrier.accumulate([Segment(key, masters[key], gradient, False) for key, gradient in enumerate(parts[2])])
    carrier.wait()
    assert torch.equal(flat, sums(parts))


@pytest.mark.usefixtures("small_slots")
@pytest.mark.parametrize("apart", ["gradients", "masters and gradients"])
def test_memory_that_is_adjacent_by_chance_is_not_taken_for_one(tier, apart):
    """Two allocations, the second of which begins where the first ends."""
    masters, parts = [], []
    for tensors, dtype in ((masters, torch.float32), (parts, torch.bfloat16)):
        memory = bytearray(8 * dtype.itemsize)
        tensors += [torch.frombuffer(memory, dtype=dtype, count=4, offset=4 * n * dtype.itemsize) for n in range(2)]
        assert tensors[0].data_ptr() + 4 * dtype.itemsize == tensors[1].data_ptr()
        assert tensors[0].untyped_storage().data_ptr() != tensors[1].untyped_storage().data_ptr()
    if apart == "gradients":
        masters = torch.empty(8).split(4)
    carrier = Carrier(masters, CPU, Wish(tier))
    for _ in range(2):
        for key in range(2):
            parts[key].fill_(key + 1)
        carry(carrier, [parts, parts], masters)
        carrier.wait()
        assert [master.tolist() for master in masters] == [[2.0] * 4, [4.0] * 4]
        carrier.renew()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_masters_take_the_sum_in_their_own_type_by_torch(dtype, tier):
    parts, flat = gradients(1000, dtype), torch.empty(1000, dtype=dtype)
    carrier = Carrier([flat], CPU, Wish(tier))
    carry(carrier, [[part] for part in parts], [flat])
    carrier.wait()
    assert torch.equal(flat, parts[0] + parts[1] + parts[2])
    assert carrier.explanation() == f"torch (the masters are {dtype})"


# The thread of host-add.


class Adding:
    """TorchAdder, and before each bucket something else."""

    def __init__(self, before):
        self.before = before

    def parts(self, segments):
        return TorchAdder().parts(segments)

    def add(self, segments, squares=None):
        self.before()
        TorchAdder().add(segments, squares)


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("trainfix-gradcopy")]


@pytest.fixture
def no_thread_yet():
    """Of an earlier test."""
    gc.collect()
    for thread in our_threads():
        thread.join(10)
    assert not our_threads()


def host_add(flat, monkeypatch, before):
    monkeypatch.setattr(choice, "host_adder", lambda: Adding(before))
    return Carrier([flat], CPU, Wish("host-add"))


@pytest.mark.usefixtures("small_slots")
@pytest.mark.parametrize("broken", range(12))
def test_an_error_in_the_thread_is_the_callers_and_training_goes_on_after_renew(monkeypatch, broken):
    calls = itertools.count()

    def fail_once():
        if next(calls) == broken:
            raise ArithmeticError("the thread's")

    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = flat.split(SIZES)
    carrier = host_add(flat, monkeypatch, fail_once)
    with pytest.raises(ArithmeticError, match="the thread's"):
        carry(carrier, parts, masters)
        carrier.wait()
    with pytest.raises(ArithmeticError, match="the thread's"):  # until the window is given up
        carrier.wait()
    for _ in range(3):
        carrier.renew()
        carry(carrier, parts, masters)
        carrier.wait()
        assert torch.equal(flat, sums(parts))


@pytest.mark.usefixtures("small_slots")
def test_nothing_behind_an_error_is_added(monkeypatch):
    calls = itertools.count()

    def fail_first():
        if next(calls) == 0:
            raise ArithmeticError

    flat, parts = torch.full((sum(SIZES),), 5.0), bfloat16_window(micro_batches=1)
    carrier = host_add(flat, monkeypatch, fail_first)
    with pytest.raises(ArithmeticError):
        carry(carrier, parts, flat.split(SIZES))
        carrier.wait()
    carrier.renew()
    assert flat.tolist() == [5.0] * sum(SIZES)


@pytest.mark.usefixtures("small_slots")
def test_the_caller_does_not_wait_for_the_addition(monkeypatch):
    go = threading.Event()
    flat, parts = torch.full((sum(SIZES),), 5.0), bfloat16_window(micro_batches=1)
    carrier = host_add(flat, monkeypatch, go.wait)
    carry(carrier, parts, flat.split(SIZES))
    assert flat.tolist() == [5.0] * sum(SIZES)
    go.set()
    carrier.wait()
    assert torch.equal(flat, sums(parts))


@pytest.mark.usefixtures("small_slots")
def test_in_line_the_sums_stand_in_the_masters_when_the_bucket_is_taken(monkeypatch):
    flat, parts = torch.full((sum(SIZES),), 5.0), bfloat16_window(micro_batches=1)
    monkeypatch.setattr(choice, "host_adder", lambda: Adding(lambda: time.sleep(0.05)))
    carry(Carrier([flat], CPU, Wish("host-add", overlap=False)), parts, flat.split(SIZES))
    assert torch.equal(flat, sums(parts))


@pytest.mark.usefixtures("small_slots", "no_thread_yet")
def test_a_fork_in_the_middle_of_work_loses_nothing_on_either_side(monkeypatch):
    """The child's window goes on with a thread of its own."""
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window(micro_batches=4)
    masters = flat.split(SIZES)
    carrier = host_add(flat, monkeypatch, lambda: time.sleep(0.01))

    def go_on_and_compare():
        for here in parts[2:]:
            carrier.accumulate([Segment(key, masters[key], gradient, False) for key, gradient in enumerate(here)])
        carrier.wait()
        return torch.equal(flat, sums(parts)) and len(our_threads()) == 1

    carry(carrier, parts[:2], masters, last=False)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # rather than wait for ever for a thread that only the parent has
        right = False
        try:
            right = go_on_and_compare()
        finally:
            os._exit(0 if right else 1)
    assert go_on_and_compare()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("small_slots", "no_thread_yet")
def test_the_thread_ends_when_its_carrier_is_gone():
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    carrier = Carrier([flat], CPU, Wish("host-add"))
    carry(carrier, parts, flat.split(SIZES))
    (thread,) = our_threads()
    carrier.wait()
    del carrier
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.usefixtures("small_slots", "no_thread_yet")
def test_tiers_without_a_thread_start_none(tier):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    carrier = Carrier([flat], CPU, Wish(tier))
    carry(carrier, parts, flat.split(SIZES))
    carrier.wait()
    assert len(our_threads()) == (tier == "host-add")


@pytest.mark.usefixtures("small_slots", "no_thread_yet")
def test_many_windows_hold_no_more_memory_than_few(tier):
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    masters = dict(enumerate(flat.split(SIZES)))
    carrier = Carrier([flat], CPU, Wish(tier))

    def tensors_after(windows):
        for _ in range(windows):
            carry(carrier, parts, masters)
            carrier.squares(masters)
            carrier.renew()
        time.sleep(0.1)  # the thread lets go of its last operation
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    few = tensors_after(5)
    assert tensors_after(50) <= few + 10
    assert len(our_threads()) == (tier == "host-add")


# Sums on the device.


class ShortOfMemory(HostDevice):
    """Has `room` bytes, and at some time too little. `fails`: gives none at all."""

    def __init__(self, room=None, fails=False):
        self.room, self.fails, self.shortages, self.slabs = room, fails, 0, []

    def memory(self, size):
        if self.fails:
            raise torch.cuda.OutOfMemoryError("none left")
        slab = super().memory(size)
        self.slabs.append(weakref.ref(slab.untyped_storage()))
        return slab

    def headroom(self):
        return self.room

    def pressure(self):
        return self.shortages


def resident(device, budget=None, elements=16):
    plan = choice.Plan(device, TorchAdder(), Wish("resident", budget), False, elements)
    return choice.build("resident", plan)


def carry_by(tier, parts, masters, *, begin=0):
    for number, here in enumerate(parts, begin):
        tier.add([Segment(key, masters[key], part, number == 0) for key, part in enumerate(here)], last=False)


def test_sums_are_taken_to_the_device_after_the_first_window_and_stay():
    flat, parts, device = torch.empty(sum(SIZES)), bfloat16_window(), ShortOfMemory()
    tier = resident(device)
    held = []
    for _ in range(3):
        carry_by(tier, parts, flat.split(SIZES))
        tier.wait()
        held.append(tier.elements)
        assert torch.equal(flat, sums(parts))
        tier.renew()
    assert held == [0, sum(SIZES), sum(SIZES)]
    assert len(device.slabs) == 1


@pytest.mark.parametrize("limit", ["budget", "headroom"])
@pytest.mark.parametrize("elements", [0, 7, 8, 39, 40, 47, 48, 71, 72, 1000])
def test_only_whole_keys_within_the_budget_have_a_place(limit, elements):
    """In the masters' order, each rounded up to 8 elements: 40, 8 and 24."""
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    budget, room = (4 * elements, None) if limit == "budget" else (None, 4 * elements)
    tier = resident(ShortOfMemory(room), budget)
    for _ in range(2):
        carry_by(tier, parts, flat.split(SIZES))
        tier.wait()
        assert torch.equal(flat, sums(parts))
        tier.renew()
    taken, left = set(), elements
    for size, rounded in ((40, 40), (3, 8), (21, 24)):
        if rounded <= left:
            left -= rounded
            taken.add(size)
    assert tier.elements == sum(taken)


def test_memory_that_runs_short_in_mid_window_is_given_back_without_losing_a_bit():
    flat, parts, device = torch.empty(sum(SIZES)), bfloat16_window(micro_batches=4), ShortOfMemory()
    masters, tier = flat.split(SIZES), resident(device)
    carry_by(tier, parts, masters)
    tier.renew()
    carry_by(tier, parts[:2], masters)
    (slab,) = device.slabs
    assert slab() is not None
    device.shortages += 1
    carry_by(tier, parts[2:], masters, begin=2)
    assert slab() is None
    assert tier.elements == 0
    tier.wait()
    assert torch.equal(flat, sums(parts))
    assert "no memory is left" in tier.describe()
    tier.renew()
    carry_by(tier, parts, masters)
    tier.wait()
    assert torch.equal(flat, sums(parts))
    assert len(device.slabs) == 1  # for good


def test_a_device_without_memory_leaves_all_to_the_next_tier():
    flat, parts = torch.empty(sum(SIZES)), bfloat16_window()
    tier = resident(ShortOfMemory(fails=True))
    for _ in range(3):
        carry_by(tier, parts, flat.split(SIZES))
        tier.wait()
        assert torch.equal(flat, sums(parts))
        tier.renew()
    assert tier.elements == 0


# Which tier it is.


def test_on_the_host_torch_is_taken_unless_another_is_asked_for(tier):
    assert Carrier([torch.zeros(3)], CPU).explanation() == "torch (the gradients are on the host)"
    asked = Carrier([torch.zeros(3)], CPU, Wish(tier))
    assert asked.tier == tier
    assert asked.explanation().endswith("(asked for)")


def test_gradients_of_an_unknown_device_are_carried_by_torch():
    carrier = Carrier([torch.zeros(3)], torch.device("meta"), Wish("ring"))
    assert carrier.explanation() == "torch (no other way is known from meta)"


class Partition(NamedTuple):
    """As much of a tensor as the choice looks at."""

    pinned: bool
    dtype: torch.dtype = torch.float32

    def is_pinned(self):
        return self.pinned


@pytest.fixture
def gpu(monkeypatch):
    """The host in the place of a GPU: returns a function that says with which adder, and what the rehearsal does."""

    def put(adder=None, rehearse=None):
        monkeypatch.setattr(choice, "_hands", lambda device: (HostDevice(), adder or TorchAdder(), []))
        monkeypatch.setattr(
            choice,
            "rehearse",
            rehearse or (lambda build, device, pinned: rehearsal.rehearse(build, CPU, False)),
        )

    return put


def test_the_tiers_are_tried_in_order_until_one_passes(gpu):
    tried = []

    def all_but_the_last(build, device, pinned):
        tried.append(build().name)
        if len(tried) < 4:
            raise RuntimeError(f"it broke at {len(tried)}")

    gpu(rehearse=all_but_the_last)
    carrier = Carrier([Partition(True)], GPU)
    assert tried == ["resident", "ring", "host-add", "torch"]
    assert carrier.explanation() == (
        "torch (the masters are pinned; not resident: it broke at 1; not ring: it broke at 2; "
        "not host-add: it broke at 3)"
    )


@pytest.mark.parametrize(
    ("pinned", "wish", "taken"),
    [
        (True, Wish(), "resident"),
        (False, Wish(), "resident"),
        (True, Wish(budget=0), "ring"),
        (False, Wish(budget=0), "host-add"),
        (True, Wish("torch"), "torch"),
        (True, Wish("host-add"), "host-add"),
    ],
)
def test_what_is_asked_for_and_what_is_pinned_decide(gpu, pinned, wish, taken):
    gpu()
    assert Carrier([Partition(pinned)], GPU, wish).tier == taken


def test_masters_of_which_some_are_not_pinned_are_not_pinned(gpu):
    gpu()
    assert "the masters are not pinned" in Carrier([Partition(True), Partition(False)], GPU).explanation()


class Rounding(TorchAdder):
    """Sums in the gradient's own type."""

    def add(self, segments, squares=None):
        super().add(segments, squares)
        for one in segments:
            one.destination.copy_(one.destination.bfloat16())


class Forgetful(TorchAdder):
    """Right sums, and the squares of half of them."""

    def add(self, segments, squares=None):
        super().add(segments, squares)
        if squares is not None:
            squares /= 2


class Broken(TorchAdder):
    def add(self, segments, squares=None):
        raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("adder", "reason"),
    [
        (Rounding(), "other bits than torch's with torch.bfloat16"),
        (Forgetful(), "another norm than torch's with torch.bfloat16"),
        (Broken(), "no kernel image is available"),
    ],
)
def test_a_tier_that_fails_its_rehearsal_carries_nobodys_gradients(gpu, adder, reason):
    """The device's adder is used by the resident tier and the ring, not by host-add."""
    gpu(adder)
    explanation = Carrier([Partition(True)], GPU).explanation()
    assert explanation.startswith("host-add")
    assert f"not resident: {reason}; not ring: {reason}" in explanation


def test_a_tier_that_is_asked_for_and_fails_gives_way_to_the_next(gpu):
    gpu(Broken())
    carrier = Carrier([Partition(True)], GPU, Wish("ring"))
    assert carrier.tier == "host-add"
    assert "asked for; not ring: no kernel image is available" in carrier.explanation()


@pytest.mark.parametrize("name", TIERS)
def test_every_tier_passes_its_rehearsal_on_the_host(name):
    plan = choice.Plan(HostDevice(), TorchAdder(), Wish(name), False, 1 << 12)
    rehearsal.rehearse(lambda: choice.build(name, plan), CPU, False)
