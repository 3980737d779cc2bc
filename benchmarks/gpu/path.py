"""The copy path alone, without DeepSpeed: milliseconds per micro-batch of each way to the host, on real models' sizes.

    PYTHONPATH=src:. python benchmarks/gpu/path.py [STEP...]

DeepSpeed's own operations are written out: of the broken releases (0.15.2 to 0.18.9) and of upstream's repair (0.19.0).
Buckets of 5e8 elements, 8 accumulation steps, bf16, one rank; of 7B a quarter of the partition, as one of four ranks
has it. All ways share one pinned partition and take a window in turn. `floor` copies 4 bytes per element to the host
once per window, and nothing else. Nothing is computed beside: whatever a way could hide, it cannot hide here.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from benchmarks.gpu import common
from benchmarks.gpu.common import Place, Row, Step
from benchmarks.gpu.models import MODELS, buckets, elements, share
from benchmarks.gpu.ratios import ratio
from trainfix.gradcopy import Carrier, Segment, Wish

BUCKET = 500_000_000
ACCUMULATION = 8
TURNS, SLOW = 5, 2.0  # what takes more seconds for a window has one turn only
TIERS = ("resident", "ring", "host-add", "torch")
FAST = TIERS[:-1]  # of the larger models: torch takes minutes there


class Partition:
    """One rank's gradients on the device and their masters on the host, [n] each, cut into parameters."""

    def __init__(self, place: Place, counts: Sequence[int], bucket: int) -> None:
        self.place, self.counts = place, list(counts)
        total = sum(counts)
        self.master = place.pinned(total)
        self.masters = list(torch.split(self.master, self.counts))
        self.buckets = buckets(self.counts, bucket)
        # DeepSpeed lays a bucket's gradients one behind the other as they come: the model's last parameter first.
        self.gradients = [torch.empty(0)] * len(counts)
        for numbers in self.buckets:
            sizes = [self.counts[number] for number in numbers]
            memory = torch.full((sum(sizes),), 2.0**-10, dtype=torch.bfloat16, device=place.device)
            memory[::3] = 3 * 2.0**-9
            for number, piece in zip(numbers, torch.split(memory, sizes), strict=True):
                self.gradients[number] = piece


class Way(Protocol):
    """A way to the host."""

    def take(self, numbers: Sequence[int], micro: int, *, last: bool) -> None:
        """Carry a bucket."""

    def finish(self) -> float:
        """Until the masters and the norm can be read. Returns the norm."""


class Upstream:
    """DeepSpeed's operations, parameter by parameter, as they stand in stage_1_and_2.py.

    But for one thing: the sum is made in the scratch and not in the gradient, which every micro-batch has to find as it
    was. As many bytes and kernels.
    """

    def __init__(self, partition: Partition, held: Sequence[torch.Tensor], *, broken: bool) -> None:
        self.partition, self.held, self.broken = partition, held, broken
        size = max(partition.counts)
        self.scratch = torch.zeros(size, dtype=torch.bfloat16, device=partition.place.device)
        self.norms: list[torch.Tensor] = []
        self.overflow = False

    def take(self, numbers: Sequence[int], micro: int, *, last: bool) -> None:
        for number in numbers:
            gradient, held = self.partition.gradients[number], self.held[number]
            if micro > 0:
                scratch = self.scratch.narrow(0, 0, gradient.numel())
                scratch.copy_(held, non_blocking=True)
                gradient = scratch.add_(gradient)
            if micro == 0 or not self.broken:
                held.copy_(gradient, non_blocking=True)
            if last:
                self.norms.append(gradient.double().norm(2))
                self._look(gradient)
                self.partition.masters[number].copy_(gradient.to(torch.float32), non_blocking=True)

    def _look(self, gradient: torch.Tensor) -> None:
        """For what is not finite: the host waits for the answer, once per parameter."""
        wide = gradient.float()
        infinite = wide.isinf().logical_or(wide.isnan())
        self.overflow = bool(infinite.float().max()) or self.overflow

    def finish(self) -> float:
        total = sum(norm.item() ** 2 for norm in self.norms)
        self.norms.clear()
        self.partition.place.synchronize()
        return math.sqrt(total)


class Ours:
    """A tier of trainfix."""

    def __init__(self, partition: Partition, tier: str) -> None:
        self.partition = partition
        self.carrier = Carrier([partition.master], partition.place.device, Wish(tier, 1 << 40, True))
        self.slices = dict(enumerate(partition.masters))

    def take(self, numbers: Sequence[int], micro: int, *, last: bool) -> None:
        masters, gradients = self.partition.masters, self.partition.gradients
        segments = [Segment(number, masters[number], gradients[number], micro == 0) for number in numbers]
        self.carrier.accumulate(segments, last=last)

    def finish(self) -> float:
        self.carrier.wait()
        total = sum(self.carrier.squares(self.slices).values())
        self.carrier.renew()
        return math.sqrt(total)


class Floor:
    """4 bytes per element to the host, once per window, in one copy."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.sums = torch.zeros(sum(partition.counts), device=partition.place.device)

    def take(self, numbers: Sequence[int], micro: int, *, last: bool) -> None: ...

    def finish(self) -> float:
        self.partition.master.copy_(self.sums, non_blocking=True)
        self.partition.place.synchronize()
        return 0.0


def window(partition: Partition, way: Way) -> Row:
    """One window, from an idle device to an idle device. host_busy_seconds: until the calls have returned."""
    partition.place.synchronize()
    begin = time.perf_counter()
    for micro in range(ACCUMULATION):
        for numbers in partition.buckets:
            way.take(numbers, micro, last=micro == ACCUMULATION - 1)
    queued = time.perf_counter() - begin
    norm = way.finish()
    partition.place.synchronize()
    whole = time.perf_counter() - begin
    return {"seconds": whole, "host_busy_seconds": queued, "norm": norm}


def measure(name: str, parts: int, tiers: Sequence[str], place: Place, _: Namespace) -> list[Row]:
    """All ways on one model, in turns."""
    counts = elements(MODELS["tiny" if place.rehearsal else name])
    partition = Partition(place, share(counts, parts), place.scale(BUCKET, 50_000))
    held = torch.split(place.pinned(sum(partition.counts), torch.bfloat16), partition.counts)
    makes: dict[str, Callable[[], Way]] = {
        **{f"trainfix, {tier}": partial(Ours, partition, tier) for tier in tiers},
        "broken": lambda: Upstream(partition, held, broken=True),
        "upstream": lambda: Upstream(partition, held, broken=False),
        "floor": lambda: Floor(partition),
    }
    ways, rows, problems = dict[str, Way](), dict[str, Row](), list[Row]()
    slow = dict[str, bool]()
    for way, make in makes.items():
        try:
            ways[way] = make()
            window(partition, ways[way])
            ends = list[Row]()  # of the second window, in which the resident sums begin
            temporaries = place.peak_above(lambda made=ways[way], ends=ends: ends.append(window(partition, made)))
        except torch.cuda.OutOfMemoryError as problem:
            problems.append({"model": name, "way": way, "problem": str(problem)[:300]})
            ways.pop(way, None)
            continue
        rows[way] = {"model": name, "way": way, "sum_sha256": _digest(partition.master), "norm": ends[0]["norm"]}
        rows[way]["device_temporaries"] = temporaries
        if isinstance(made := ways[way], Ours):
            rows[way]["carried_by"] = made.carrier.explanation()
        slow[way] = ends[0]["seconds"] > SLOW
    turns: dict[str, list[Row]] = {way: [] for way in ways}
    for turn in range(TURNS):
        for way, made in ways.items():
            if turn == 0 or not slow[way]:
                turns[way].append(window(partition, made))
    for way, taken in turns.items():
        whole = [one["seconds"] for one in taken]
        rows[way] |= {
            "elements": sum(partition.counts),
            "parameters": len(partition.counts),
            "buckets": len(partition.buckets),
            "accumulation": ACCUMULATION,
            "window_seconds": whole,
            "micro_batch_ms": 1e3 * sorted(whole)[len(whole) // 2] / ACCUMULATION,
            "host_busy_seconds": [one["host_busy_seconds"] for one in taken],
        }
        for other in ("broken", "upstream", "floor"):
            if other in turns:
                there = [one["seconds"] for one in turns[other]]
                shared = min(len(whole), len(there))
                rows[way][f"time_over_{other}"] = ratio(whole[:shared], there[:shared])._asdict()
    return [*rows.values(), *problems]


def _digest(master: torch.Tensor) -> str:
    """Of the first 16 Mi elements' bytes."""
    return hashlib.sha256(master[: 1 << 24].numpy().tobytes()).hexdigest()[:16]


STEPS = {
    "0.5B": Step(80, partial(measure, "0.5B", 1, TIERS)),
    "1.5B": Step(110, partial(measure, "1.5B", 1, FAST)),
    "7B-quarter": Step(140, partial(measure, "7B", 4, FAST)),
}


def main(arguments: list[str] | None = None) -> int:
    options = common.parser(str(__doc__), STEPS).parse_args(arguments)
    return common.main("path", "the copy path alone", STEPS, options)


if __name__ == "__main__":
    sys.exit(main())
