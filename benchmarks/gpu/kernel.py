"""Does the kernel add right on this GPU, how fast, and how fast straight into pinned memory of the host?

    PYTHONPATH=src:. python benchmarks/gpu/kernel.py [STEP...]

Compared bit for bit with torch on the host. In a rehearsal torch stands in for the kernels.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from benchmarks.gpu import common
from benchmarks.gpu.common import Place, Row, Step, seconds
from trainfix.gradcopy.arithmetic import TorchAdder
from trainfix.gradcopy.segments import Adder, Segment

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (4096, 1003, 7, 30_000)  # and one that is many rows
REPEATS = 5
MAKES = Callable[..., Adder]


def makers(place: Place) -> Iterator[tuple[str, MAKES]]:
    """Name -> a function of the device and, if given, `programs`: every kernel there is, whether it works or not."""
    if place.rehearsal:
        yield "torch", lambda device, programs=None: TorchAdder()
        return
    from trainfix.gradcopy.kernels.bucket import TritonAdder
    from trainfix.gradcopy.kernels.twin import TwinAdder

    yield "Triton", TritonAdder
    yield "CUDA C++", TwinAdder


def chosen(place: Place) -> MAKES:
    """The kernel that trainfix takes here, with a bound on its programs where one is given."""
    if place.rehearsal:
        return lambda device, programs=None: TorchAdder()
    from trainfix.gradcopy import kernels

    found: Any = type(kernels.adder(place.device))
    return found


def correct(place: Place, _: Namespace) -> list[Row]:
    """Every dtype, shift against 16 bytes and memory of the sums, five times: the bits must be torch's each time."""
    rows: list[Row] = []
    for name, make in makers(place):
        try:
            adder = make(place.device)
            for dtype in DTYPES:
                for pinned in (False, True):
                    rows.extend(_shifts(place, adder, name, dtype, pinned=pinned))
        except Exception as problem:  # a kernel that cannot be had is a result
            rows.append({"kernel": name, "problem": f"{type(problem).__name__}: {problem}"[:500]})
    return rows


def _shifts(place: Place, adder: Adder, name: str, dtype: torch.dtype, *, pinned: bool) -> Iterator[Row]:
    for gradient_shift, sum_shift in ((0, 0), (1, 1), (4, 4), (0, 1), (3, 2)):
        found = [_once(place, adder, dtype, gradient_shift, sum_shift, pinned=pinned) for _ in range(REPEATS)]
        yield {
            "kernel": name,
            "gradient": str(dtype).removeprefix("torch."),
            "sums": "pinned" if pinned else "device",
            "shifts": [gradient_shift, sum_shift],
            "bitwise": all(bits for bits, _, _ in found),
            "squares_relative_error": max(error for _, error, _ in found),
            "squares_repeat": len({squares for _, _, squares in found}) == 1,
        }


def _once(
    place: Place, adder: Adder, dtype: torch.dtype, gradient_shift: int, sum_shift: int, *, pinned: bool
) -> tuple[bool, float, float]:
    """(right bits, relative error of the squares, their sum) of a store and an addition."""
    lengths = (*LENGTHS, place.scale(3_000_017, 3_017))
    total = sum(lengths)
    bucket = torch.zeros(total + gradient_shift, dtype=dtype, device=place.device)
    sums = place.pinned(total + sum_shift) if pinned else torch.zeros(total + sum_shift, device=place.device)
    stored, added, expected = _gradients(dtype, total)
    squares = torch.zeros(0)
    for first, values in ((True, stored), (False, added)):
        bucket[gradient_shift:].copy_(values)
        gradients, places = torch.split(bucket[gradient_shift:], lengths), torch.split(sums[sum_shift:], lengths)
        segments = [Segment(key, places[key], gradients[key], first) for key in range(len(lengths))]
        squares = torch.zeros(sum(adder.parts(segments)), dtype=torch.float64, device=place.device)
        adder.add(segments, squares)
        place.synchronize()
    right = float(expected.double().square().sum())
    taken = float(squares.sum())
    return torch.equal(sums[sum_shift:].cpu(), expected), abs(taken - right) / right, taken


def resident(place: Place, _: Namespace) -> list[Row]:
    """Sums on the device, by how many programs run at once, against torch's additions. 10 bytes per element."""
    count = place.scale(1 << 28, 1 << 16)
    gradient = torch.ones(count, dtype=torch.bfloat16, device=place.device)
    sums = torch.zeros(count, device=place.device)
    rows: list[Row] = []
    moved = 10 * count / 1e9
    for programs in _programs(place, (1, 2, 4, 8, 16)):
        adder = chosen(place)(place.device, programs)
        segments = [Segment(0, sums, gradient, False)]
        squares = torch.zeros(sum(adder.parts(segments)), dtype=torch.float64, device=place.device)
        for name, room in (("sum", None), ("sum and squares", squares)):

            def add(adder: Adder = adder, room: torch.Tensor | None = room, segments: Any = segments) -> None:
                adder.add(segments, room)

            rows.append({"way": name, "programs": programs, "gb_s": moved / seconds(place, add)})
    torchs = {
        "torch add_": lambda: sums.add_(gradient),
        "torch add_ of the cast": lambda: sums.add_(gradient.float()),
        "torch add_, norm": lambda: (sums.add_(gradient), torch.linalg.vector_norm(sums, dtype=torch.float64)),
    }
    rows.extend({"way": name, "programs": None, "gb_s": moved / seconds(place, work)} for name, work in torchs.items())
    return rows


def zero_copy(place: Place, _: Namespace) -> list[Row]:
    """Sums in pinned memory, read and written by the kernel itself over the link, by how many programs run at once."""
    count = place.scale(1 << 26, 1 << 16)
    gradient, sums = torch.ones(count, dtype=torch.bfloat16, device=place.device), place.pinned(count)
    rows: list[Row] = []
    moved = 4 * count / 1e9
    for programs in (2, 4, 8, 16, 32, 64, 132, 264) if not place.rehearsal else (2,):
        adder = chosen(place)(place.device, programs)
        row: Row = {"programs": programs}
        for name, first in (("store_gb_s", True), ("add_each_way_gb_s", False)):
            segments = [Segment(0, sums, gradient, first)]
            row[name] = moved / seconds(place, lambda adder=adder, segments=segments: adder.add(segments, None), 3)
        rows.append(row)
    return rows


@lru_cache(maxsize=1)
def _gradients(dtype: torch.dtype, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is stored, what is added to it, and the sum as torch's on the host."""
    generator = torch.Generator().manual_seed(0)
    stored, added = (torch.randn(count, generator=generator).to(dtype) for _ in range(2))
    return stored, added, stored.float() + added.float()


def _programs(place: Place, per_multiprocessor: tuple[int, ...]) -> list[int]:
    if place.rehearsal:
        return [1]
    return [each * torch.cuda.get_device_properties(place.device).multi_processor_count for each in per_multiprocessor]


STEPS = {"correct": Step(60, correct), "resident": Step(20, resident), "zero_copy": Step(20, zero_copy)}


def main(arguments: list[str] | None = None) -> int:
    options = common.parser(str(__doc__), STEPS).parse_args(arguments)
    return common.main("kernel", "the kernel: right bits, and its speed", STEPS, options)


if __name__ == "__main__":
    sys.exit(main())
