"""A dress rehearsal on the very device: a few small windows, compared bit for bit with torch on the host.

Nobody's gradients go through a kernel or a schedule of streams that has not just given the right bits there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from trainfix.gradcopy.arithmetic import TorchAdder
from trainfix.gradcopy.segments import Segment
from trainfix.gradcopy.tier import Tier

# Odd lengths and one that spans many slots; the last is in no bucket of every second micro-batch.
_LENGTHS = [4096, 1003, 7, 30_000, 4096]
_WINDOWS, _MICRO_BATCHES = 3, 3


class Mismatch(Exception):
    """A tier that gave other bits than torch, or another norm."""


def rehearse(build: Callable[[], Tier], device: torch.device, pinned: bool) -> None:
    """Raises Mismatch, or what the tier raises."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((sum(_LENGTHS),), math.nan, pin_memory=pinned)
    masters = torch.split(flat, _LENGTHS)
    tier = build()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for _ in range(_WINDOWS):
            _rehearse_window(tier, masters, dtype, device, generator)


def _rehearse_window(
    tier: Tier,
    masters: Sequence[torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    expected = [torch.full_like(master, math.nan) for master in masters]
    touched = set[int]()
    for number in range(_MICRO_BATCHES):
        values = torch.randn(sum(_LENGTHS), generator=generator).to(dtype)
        parts, bucket = torch.split(values, _LENGTHS), values.to(device).clone()
        keys: list[int] = [key for key in reversed(range(len(_LENGTHS))) if number % 2 == 0 or key != len(_LENGTHS) - 1]
        here = torch.split(bucket, _LENGTHS)
        last = number == _MICRO_BATCHES - 1
        tier.add([Segment(key, masters[key], here[key], key not in touched) for key in keys], last=last)
        bucket.fill_(math.nan)  # as the caller's next bucket would, on the caller's stream
        TorchAdder().add([Segment(key, expected[key], parts[key], key not in touched) for key in keys])
        touched.update(keys)
    tier.wait()
    squares = tier.squares()
    for key, right in enumerate(expected):
        if not torch.equal(masters[key], right):
            raise Mismatch(f"other bits than torch's with {dtype}")
        norm = float(right.double().square().sum())
        if key in squares and not math.isclose(squares[key], norm, rel_tol=1e-9):
            raise Mismatch(f"another norm than torch's with {dtype}")
    tier.renew()
