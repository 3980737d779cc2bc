"""How much does a running matrix product slow down while gradients are carried beside it?

    PYTHONPATH=src:. python benchmarks/gpu/interference.py [STEP...]

The products run on the current stream, the carrying on another one. `slowdown` is their time beside it / alone, in
turns; `gb_s` is 4 bytes per element / the time until the sums stand where they belong.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from threading import Thread

import torch

from benchmarks.gpu import common
from benchmarks.gpu.common import Place, Row, Step
from benchmarks.gpu.kernel import chosen
from benchmarks.gpu.ratios import ratio
from trainfix.gradcopy import Carrier, Segment, Wish

TURNS = 5


def _measure(place: Place, ways: dict[str, tuple[Callable[[], object], Callable[[], object]]], count: int) -> list[Row]:
    """ways: name -> (queue the carrying on the current stream, wait until it is done)."""
    width, products = place.scale(8192, 64), place.scale(40, 2)
    left = torch.randn(width, width, device=place.device).to(torch.bfloat16)
    beside = place.stream()

    def multiply() -> float:
        begin = place.mark()
        for _ in range(products):
            left @ left
        end = place.mark()
        place.synchronize()
        return place.between(begin, end)

    def carry(queue: Callable[[], object], wait: Callable[[], object], rates: list[float]) -> None:
        begin = time.perf_counter()
        with place.on(beside):
            queue()
        wait()
        if beside is not None:
            beside.synchronize()
        rates.append(4 * count / 1e9 / (time.perf_counter() - begin))

    multiply()
    rows: list[Row] = []
    for name, (queue, wait) in ways.items():
        alone, together, rates = list[float](), list[float](), list[float]()
        for turn in range(TURNS + 1):
            free = multiply()
            # From a thread: a tier may let its caller wait, and the products must be queued all the same.
            thread = Thread(target=carry, args=(queue, wait, rates))
            thread.start()
            busy = multiply()
            thread.join()
            if turn:
                alone.append(free)
                together.append(busy)
        rates.pop(0)
        slowdown = ratio(together, alone)
        flops = products * 2 * width**3
        rows.append(
            {
                "way": name,
                "slowdown": slowdown._asdict(),
                "alone_tflop_s": flops / 1e12 / min(alone),
                "products_seconds": min(alone),
                "gb_s": sorted(rates)[len(rates) // 2],
            }
        )
    return rows


def tiers(place: Place, _: Namespace) -> list[Row]:
    """Each tier takes one bucket beside the products. A wait that outlasts them is in the rate, not in the slowdown."""
    count, parts = place.scale(1 << 28, 1 << 16), 64
    masters, gradient = place.pinned(count), torch.ones(count, dtype=torch.bfloat16, device=place.device)
    places, pieces = masters.chunk(parts), gradient.chunk(parts)
    segments = [Segment(key, places[key], pieces[key], False) for key in range(parts)]
    carriers = {
        name: Carrier([masters], place.device, Wish(name, 1 << 40, True)) for name in ("resident", "ring", "host-add")
    }
    for carrier in carriers.values():  # the resident sums begin in the second window
        carrier.accumulate([one._replace(first=True) for one in segments], last=True)
        carrier.wait()
        carrier.renew()
        carrier.accumulate([one._replace(first=True) for one in segments])
        carrier.wait()
    ways = {
        f"{name} ({carrier.tier})": (lambda carrier=carrier: carrier.accumulate(segments), carrier.wait)
        for name, carrier in carriers.items()
    }
    resident = carriers["resident"]
    ways["resident, a window's last bucket"] = lambda: resident.accumulate(segments, last=True), resident.wait
    return _measure(place, ways, count)


def zero_copy(place: Place, _: Namespace) -> list[Row]:
    """The kernel adds straight into pinned memory, by how many programs run at once."""
    count = place.scale(1 << 27, 1 << 16)
    masters, gradient = place.pinned(count), torch.ones(count, dtype=torch.bfloat16, device=place.device)
    segments = [Segment(0, masters, gradient, False)]
    adders = {
        programs: chosen(place)(place.device, programs) for programs in ((8,) if place.rehearsal else (8, 16, 32, 132))
    }
    ways = {
        f"zero-copy, {programs} programs": (lambda adder=adder: adder.add(segments, None), lambda: None)
        for programs, adder in adders.items()
    }
    return _measure(place, ways, count)


STEPS = {"tiers": Step(45, tiers), "zero_copy": Step(40, zero_copy)}


def main(arguments: list[str] | None = None) -> int:
    options = common.parser(str(__doc__), STEPS).parse_args(arguments)
    return common.main("interference", "what carrying takes from the computation", STEPS, options)


if __name__ == "__main__":
    sys.exit(main())
