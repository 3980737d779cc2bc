"""Buckets of every kind, and what is wrong with an adder's sums of them: each is compared with torch on the CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from trainfix.gradcopy.kernels.launches import KernelAdder
from trainfix.gradcopy.segments import Segment

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")
Placing = Callable[[torch.Tensor], torch.Tensor]


class Place(NamedTuple):
    """Where one segment lies: in which memory of its side, from which element on."""

    gradient_memory: int
    gradient: int
    destination_memory: int
    destination: int
    elements: int


class Arrangement(NamedTuple):
    """launches: of a bucket whose segments are all first, or none. skew: elements from a multiple of 16 bytes."""

    places: tuple[Place, ...]
    launches: int
    skew: int = 0


def _behind_each_other(sizes: Sequence[int], *, gradient: int = 0, destination: int = 0) -> tuple[Place, ...]:
    begins = [*itertools.accumulate(sizes, initial=0)]
    return tuple(
        Place(0, gradient + begin, 0, destination + begin, size) for begin, size in zip(begins, sizes, strict=False)
    )


ODD = (4096, 17, 5000, 8, 1, 0, 2049)
ARRANGEMENTS = {
    "all at multiples of 16 bytes": Arrangement(_behind_each_other((4096, 8, 9008, 16)), 1),
    "odd sizes": Arrangement(_behind_each_other(ODD), 2),
    "both sides begin at the same odd place": Arrangement(_behind_each_other((4200,), gradient=3, destination=3), 2),
    "sides shifted against one another": Arrangement(_behind_each_other((4096, 8), gradient=1, destination=6), 1),
    "memory not at 16 bytes": Arrangement(_behind_each_other((2104,)), 1, skew=1),
    "several memories": Arrangement(
        (Place(0, 0, 0, 0, 4096), Place(1, 8, 0, 4104, 24), Place(0, 4096, 1, 8, 40), Place(1, 32, 1, 64, 11)), 5
    ),
}
WINDOWS = {"first": (True,), "later": (False,), "first and later": (True, False)}  # taken in turn by the segments


def complaints(adder: KernelAdder, *, until: int | None = None, pinned: bool = False) -> list[str]:
    """What is wrong, in words, until so many are found. pinned: destinations and squares lie on the host, pinned."""
    return [*itertools.islice(_complaints(adder, pinned), until)]


def _complaints(adder: KernelAdder, pinned: bool) -> Iterator[str]:
    device = adder._device

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if pinned else tensor.to(device)

    launched = _count_launches(adder)
    for (arrangement_name, arrangement), (window_name, window), dtype, taken in itertools.product(
        ARRANGEMENTS.items(), WINDOWS.items(), DTYPES, (True, False)
    ):
        name = f"{dtype}, {window_name}, {arrangement_name}, squares {taken}"
        if arrangement.skew and dtype is not torch.float32:
            arrangement = arrangement._replace(skew=2)  # as many bytes
        bucket = _bucket(arrangement, dtype, window, device, placed)
        before = launched.count
        squares = placed(_squares(adder, bucket.segments)) if taken else None
        adder.add(bucket.segments, squares)
        _wait(device)
        for number, (destination, right) in enumerate(zip(bucket.destinations, bucket.expected, strict=True)):
            wrong = destination.cpu().view(torch.int32) != right.view(torch.int32)
            if wrong.any():
                yield f"{name}: {int(wrong.sum())} elements of memory {number} have other bits"
        if squares is not None:
            yield from (f"{name}: {words}" for words in _wrong_squares(adder, bucket, squares.cpu()))
        if len(window) == 1 and launched.count - before != arrangement.launches:
            yield f"{name}: {launched.count - before} launches, not {arrangement.launches}"
    yield from _not_finite(adder, placed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bucket(NamedTuple):
    segments: list[Segment]
    destinations: list[torch.Tensor]
    expected: list[torch.Tensor]


def _bucket(
    arrangement: Arrangement, dtype: torch.dtype, window: Sequence[bool], device: torch.device, placed: Placing
) -> Bucket:
    generator = torch.Generator().manual_seed(len(arrangement.places))
    gradients = [
        _values(_end(arrangement, 0, number), dtype, generator, arrangement.skew).to(device)
        for number in range(1 + max(place.gradient_memory for place in arrangement.places))
    ]
    skew = arrangement.skew * dtype.itemsize // 4
    destinations = [
        # Behind the last place are 9 elements that nobody may touch.
        placed(_values(_end(arrangement, 2, number) + 9, torch.float32, generator, skew))
        for number in range(1 + max(place.destination_memory for place in arrangement.places))
    ]
    expected = [destination.cpu().clone() for destination in destinations]
    segments = []
    for key, (place, first) in enumerate(zip(arrangement.places, itertools.cycle(window), strict=False)):
        gradient = gradients[place.gradient_memory].narrow(0, place.gradient, place.elements)
        into, right = (
            side[place.destination_memory].narrow(0, place.destination, place.elements)
            for side in (destinations, expected)
        )
        if first:
            into.fill_(math.nan)  # what an earlier window left must not matter
        right.copy_(gradient.cpu().float() if first else right + gradient.cpu().float())
        segments.append(Segment(key, into, gradient, first))
    return Bucket(segments, destinations, expected)


def _end(arrangement: Arrangement, side: int, number: int) -> int:
    """Elements up to the last place's end. side: 0 for gradients', 2 for destinations' memories."""
    return max(place[side + 1] + place.elements for place in arrangement.places if place[side] == number)


def _values(elements: int, dtype: torch.dtype, generator: torch.Generator, skew: int) -> torch.Tensor:
    """Random numbers of many sizes, every seventh -0, every eleventh subnormal, in memory of their own."""
    values = torch.randn(elements, generator=generator, dtype=torch.float32)
    values = (values * torch.exp2(torch.randint(-12, 8, (elements,), generator=generator).float())).to(dtype)
    values[::7] = -0.0
    values[::11] = torch.finfo(dtype).smallest_normal / 4
    memory = bytearray(16 + (elements + skew) * dtype.itemsize)
    at_16 = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16
    placed = torch.frombuffer(memory, dtype=dtype, offset=at_16 + skew * dtype.itemsize, count=elements)
    return placed.copy_(values)


def _squares(adder: KernelAdder, segments: Sequence[Segment]) -> torch.Tensor:
    return torch.full((sum(adder.parts(segments)),), -1.0, dtype=torch.float64)


def _wrong_squares(adder: KernelAdder, bucket: Bucket, squares: torch.Tensor) -> Iterator[str]:
    for segment, parts in zip(bucket.segments, squares.split(adder.parts(bucket.segments)), strict=True):
        right = float(segment.destination.cpu().double().square().sum())
        if not math.isclose(float(parts.sum()), right, rel_tol=1e-12):
            yield f"the squares of segment {segment.key} sum to {float(parts.sum())!r}, not {right!r}"


def _not_finite(adder: KernelAdder, placed: Placing) -> Iterator[str]:
    """One bad element: exactly the sum of its row is not finite, and it stays in the master gradient."""
    for bad, place, first in itertools.product((math.inf, -math.inf, math.nan), (0, 4096, 9000), (True, False)):
        gradient, destination = torch.ones(9001, dtype=torch.bfloat16), placed(torch.ones(9001))
        gradient[place] = bad
        segments = [Segment(0, destination, gradient.to(adder._device), first)]
        squares = placed(_squares(adder, segments))
        adder.add(segments, squares)
        _wait(adder._device)
        rows = (~squares.isfinite()).nonzero().flatten().tolist()
        row = 3 if place == 9000 else place // 4096  # 9001 elements are three aligned rows and one that is not
        elements = (~destination.isfinite()).nonzero().flatten().tolist()
        if rows != [row] or elements != [place] or not _alike(float(destination[place]), bad):
            yield f"{bad} at {place}: squares {rows} and elements {elements} are not finite"


def _alike(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


class _Launches:
    def __init__(self) -> None:
        self.count = 0


def _count_launches(adder: KernelAdder) -> _Launches:
    launches, launch = _Launches(), adder._launch

    def counted(*arguments: object, **keywords: object) -> None:
        launches.count += 1
        launch(*arguments, **keywords)

    adder._launch = counted
    return launches


def caught(make: Callable[[str], KernelAdder], text: str, changes: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """For each change of the kernel's text (old, new) the first complaint. "unchanged": all complaints."""
    found = {"unchanged": complaints(make(text))}
    for name, (old, new) in changes.items():
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands {text.count(old)} times in the kernel")
        found[name] = complaints(make(text.replace(old, new)), until=1)
    return found
