"""How fast is the link between this GPU and the host, and what does pinned memory cost?

PYTHONPATH=src:. python benchmarks/gpu/links.py [STEP...]
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from typing import Any

import torch

from benchmarks.gpu import common
from benchmarks.gpu.common import Place, Row, Step, seconds

GIB = 1 << 30


def speeds(place: Place, _: Namespace) -> list[Row]:
    """Pinned memory, by the size of a copy: each way alone, and both at once."""
    rows = []
    in_stream, out_stream = place.stream(), place.stream()
    for size in (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30):
        if place.rehearsal and size > 1 << 22:
            break
        copies = max(1, place.scale(1 << 28, 1 << 22) // size)
        here, there = place.pinned(size, torch.uint8), place.pinned(size, torch.uint8)
        source, into = (torch.zeros(size, dtype=torch.uint8, device=place.device) for _ in range(2))

        def up(copies: int = copies, here: torch.Tensor = here, into: torch.Tensor = into) -> None:
            for _ in range(copies):
                into.copy_(here, non_blocking=True)

        def down(copies: int = copies, there: torch.Tensor = there, source: torch.Tensor = source) -> None:
            for _ in range(copies):
                there.copy_(source, non_blocking=True)

        def both(up: Any = up, down: Any = down) -> None:
            with place.on(in_stream):
                up()
            with place.on(out_stream):
                down()

        moved = copies * size / 1e9
        rows.append(
            {
                "bytes": size,
                "to_device_gb_s": moved / seconds(place, up),
                "to_host_gb_s": moved / seconds(place, down),
                "both_each_gb_s": moved / seconds(place, both),
            }
        )
    return rows


def pageable(place: Place, _: Namespace) -> list[Row]:
    """Ordinary memory, and whether a copy from the device returns before it is done."""
    size = place.scale(1 << 28, 1 << 20)
    host, device = (
        torch.zeros(size, dtype=torch.uint8),
        torch.zeros(size, dtype=torch.uint8, device=place.device),
    )
    host.copy_(device, non_blocking=True)
    place.synchronize()
    begin = time.perf_counter()
    host.copy_(device, non_blocking=True)
    returned = time.perf_counter() - begin
    place.synchronize()
    whole = time.perf_counter() - begin
    return [
        {
            "bytes": size,
            "to_device_gb_s": size / 1e9 / seconds(place, lambda: device.copy_(host, non_blocking=True)),
            "to_host_gb_s": size / 1e9 / seconds(place, lambda: host.copy_(device, non_blocking=True)),
            "to_host_returns_after": returned / whole,
        }
    ]


def pin(place: Place, _: Namespace) -> list[Row]:
    """Seconds to pin, and what torch's allocator really takes for a size that is no power of two."""
    rows: list[Row] = []
    for size in (GIB, 3 * GIB, 4 * GIB, 9 * GIB) if not place.rehearsal else (1 << 20,):
        before = _pinned_bytes()
        begin = time.perf_counter()
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=not place.rehearsal)
        taken = time.perf_counter() - begin
        after = _pinned_bytes()
        block = None if before is None or after is None else after - before
        rows.append({"bytes": size, "by": "torch", "seconds": taken, "taken_bytes": block})
        del memory
    if not place.rehearsal:
        ordinary, runtime = torch.zeros(3 * GIB, dtype=torch.uint8), torch.cuda.cudart()
        begin = time.perf_counter()
        code = runtime.cudaHostRegister(ordinary.data_ptr(), ordinary.numel(), 0)
        taken = time.perf_counter() - begin
        row = {"bytes": 3 * GIB, "by": "cudaHostRegister", "seconds": taken, "taken_bytes": 3 * GIB}
        rows.append({**row, "result": str(code), "is_pinned": ordinary.is_pinned()})
        runtime.cudaHostUnregister(ordinary.data_ptr())
    return rows


def _pinned_bytes() -> int | None:
    """What the allocator holds now; None where torch does not count it."""
    counts = getattr(torch.cuda, "host_memory_stats", None)
    if counts is None or not torch.cuda.is_available():
        return None
    found = counts()
    for name in ("reserved_bytes.current", "allocated_bytes.current", "active_bytes.current"):
        if name in found:
            return int(found[name])
    return None


STEPS = {"speeds": Step(25, speeds), "pageable": Step(8, pageable), "pin": Step(30, pin)}


def main(arguments: list[str] | None = None) -> int:
    options = common.parser(str(__doc__), STEPS).parse_args(arguments)
    return common.main("links", "the link between device and host", STEPS, options)


if __name__ == "__main__":
    sys.exit(main())
