"""What the kernels are given, shown with an adder that does the rows one by one in torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gradcopy.kernels.buckets import CPU, complaints
from trainfix.gradcopy.kernels import launches
from trainfix.gradcopy.kernels.launches import KernelAdder
from trainfix.gradcopy.segments import Segment


class RowByRow(KernelAdder):
    """Notes the launches, and that what is called aligned lies at 16 bytes."""

    def __init__(self, programs=None):
        super().__init__(CPU, programs)
        self.programs = []

    def _launch(self, gradient, destination, rows, squares, *, first, vector, programs):
        self.programs.append(programs)
        for source, place, elements, square in rows.tolist():
            part, into = gradient.narrow(0, source, elements), destination.narrow(0, place, elements)
            if vector > 1:
                assert vector == 16 // part.element_size()
                assert (part.data_ptr() % 16, into.data_ptr() % 16, elements % vector) == (0, 0, 0)
            into.copy_(part.float() if first else into + part.float())
            if squares is not None:
                squares[square] = into.double().square().sum()


class Unlaunched(KernelAdder):
    """Gets everything ready."""

    def __init__(self):
        super().__init__(CPU)
        self.tables = []

    def _launch(self, gradient, destination, rows, squares, **how):
        self.tables.append((rows.tolist(), how["vector"]))


def segment(elements=64, *, key=0, first=True, dtype=torch.bfloat16, begin=0):
    gradient, destination = torch.ones(begin + elements, dtype=dtype), torch.zeros(begin + elements)
    return Segment(key, destination[begin:], gradient[begin:], first)


def test_rows_and_bases_give_the_right_sums_for_buckets_of_every_kind():
    assert complaints(RowByRow()) == []


def test_no_segments_are_nothing_to_do():
    adder = RowByRow()
    adder.add([], torch.empty(0, dtype=torch.float64))
    assert adder.parts([]) == []
    assert adder.programs == []


def test_programs_are_bounded_by_the_constructor_and_by_the_rows():
    adder = RowByRow(programs=3)
    adder.add([segment(2 * 4096)], None)
    adder.add([segment(5 * 4096)], None)
    assert adder.programs == [2, 3]


def test_a_bucket_has_one_table_in_every_slot_of_a_ring_and_in_new_memory():
    adder = Unlaunched()
    slots, gradients = torch.zeros(4 * 64), torch.ones(4 * 64, dtype=torch.bfloat16)
    for slot in range(4):
        adder.add([Segment(0, slots[slot * 64 :][:50], gradients[slot * 64 :][:50], True)], None)
    adder.add([segment(50)], None)
    assert len(adder._layouts) == 1
    assert all(table == adder.tables[0] for table in adder.tables[::2])


def test_a_bucket_has_one_table_whether_it_begins_a_window_or_goes_on_with_it():
    adder = Unlaunched()
    for first in (True, False):
        adder.add([segment(key=1, first=first), segment(key=2, first=first)], None)
    assert len(adder._layouts) == 1


def test_a_slot_shifted_by_less_than_16_bytes_is_another_layout():
    adder = Unlaunched()
    adder.add([segment(50)], None)
    adder.add([segment(50, begin=1)], None)
    assert len(adder._layouts) == 2


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_layout_that_has_been_seen_carries_nothing_to_the_device():
    adder = Unlaunched()
    segments = [segment(100)]
    squares = torch.zeros(sum(adder.parts(segments)), dtype=torch.float64)
    with Operations() as steady:
        adder.add(segments, squares)
    assert steady.names == {"as_strided"}
    with Operations() as new:
        adder.add([segment(101)], None)
    assert new.names > {"as_strided"}


def test_the_tables_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(launches, "LAYOUTS", 3)
    adder = RowByRow()
    for elements in (*range(1, 9), *range(1, 9)):
        one = segment(elements)
        adder.add([one], None)
        assert one.destination.tolist() == [1] * elements
        assert len(adder._layouts) <= 3


WRONG = {
    "lengths": (
        Segment(1, torch.zeros(4), torch.ones(1), True),
        r"a master gradient of shape \(4,\) cannot take a gradient of shape \(1,\)",
    ),
    "dimensions": (Segment(1, torch.zeros(2, 2), torch.ones(2, 2), True), "segments of one dimension"),
    "gaps in the gradient": (Segment(1, torch.zeros(2), torch.ones(4)[::2], True), "one behind the other"),
    "gaps in the destination": (Segment(1, torch.zeros(4)[::2], torch.ones(2), True), "one behind the other"),
    "narrower masters": (
        Segment(1, torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), True),
        r"add bfloat16, float16 and float32 to float32, not torch\.float32 to torch\.bfloat16",
    ),
    "float64 gradients": (
        Segment(1, torch.zeros(2), torch.ones(2, dtype=torch.float64), True),
        r"not torch\.float64 to torch\.float32",
    ),
    "another device": (
        Segment(1, torch.zeros(2), torch.ones(2, device="meta"), True),
        "the kernels of cpu add gradients that are there .* not gradients on meta to destinations on cpu",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_segment_that_no_kernel_takes_is_an_error_that_leaves_everything_untouched(kind):
    bad, words = WRONG[kind]
    good = segment(4)
    with pytest.raises(ValueError, match=words):
        RowByRow().add([good, bad], None)
    assert good.destination.tolist() == [0] * 4


def test_two_gradients_for_the_same_elements_are_an_error_that_leaves_them_untouched():
    destination = torch.zeros(8)
    segments = [Segment(0, destination[:5], torch.ones(5), True), Segment(1, destination[4:], torch.ones(4), True)]
    with pytest.raises(ValueError, match="two gradients of one bucket go to the same elements"):
        RowByRow().add(segments, None)
    assert destination.tolist() == [0] * 8


@pytest.mark.parametrize("squares", [torch.zeros(3, dtype=torch.float64), torch.zeros(1), torch.zeros(1, 1).double()])
def test_squares_of_another_number_or_type_are_an_error_that_leaves_everything_untouched(squares):
    one = segment(4)
    with pytest.raises(ValueError, match="these segments give 1 sums of squares, float64"):
        RowByRow().add([one], squares)
    assert one.destination.tolist() == [0] * 4
