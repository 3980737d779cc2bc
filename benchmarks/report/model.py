"""What the bytes alone would take on a link: arithmetic, nothing measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

ELEMENTS = 7_000_000_000
LINKS = {"PCIe 5 x16": 55.0, "PCIe 4 x16": 25.0}  # GB/s each way, assumed to be reached
ACCUMULATIONS = (1, 2, 4, 8, 16, 32)
ASSUMPTIONS = (
    f"{ELEMENTS:.0e} parameters on one rank, bf16 gradients, float32 masters; seconds per optimizer step.",
    "The link gives " + ", ".join(f"{rate:g} GB/s each way ({name})" for name, rate in LINKS.items()) + ".",
    "Serial: a direction waits for the other, as DeepSpeed's copies do. Both ways: the slower direction counts.",
    "Nothing else takes time: no launches, no host syncs, no additions, no memory bandwidth of the host.",
    "The times are of the link; how much of them hides behind computation is not modelled.",
)


class Design(NamedTuple):
    """up, down: bytes per element to the device and to the host, by accumulation steps. both_ways: at once."""

    up: Callable[[int], int]
    down: Callable[[int], int]
    both_ways: bool


DESIGNS = {
    "broken (0.15.2 to 0.18.9)": Design(lambda steps: 2 * (steps - 1), lambda steps: 6 if steps > 1 else 4, False),
    "upstream's repair (0.19)": Design(
        lambda steps: 2 * (steps - 1), lambda steps: 2 * steps + 4 if steps > 1 else 4, False
    ),
    "trainfix, resident": Design(lambda steps: 0, lambda steps: 4, False),
    "trainfix, ring": Design(lambda steps: 4 * (steps - 1), lambda steps: 4 * steps, True),
    "trainfix, host-add": Design(lambda steps: 0, lambda steps: 2 * steps, False),
}


def seconds(design: Design, steps: int, gigabytes_per_second: float) -> float:
    """Of one optimizer step's copies."""
    up, down = design.up(steps), design.down(steps)
    per_element = max(up, down) if design.both_ways else up + down
    return per_element * ELEMENTS / 1e9 / gigabytes_per_second
