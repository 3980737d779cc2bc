"""Which tier carries an optimizer's gradients, and why."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from trainfix.gradcopy.arithmetic import TorchAdder, host_adder
from trainfix.gradcopy.host_add import HostAdd
from trainfix.gradcopy.inline import Inline
from trainfix.gradcopy.queues import Device, HostDevice
from trainfix.gradcopy.rehearsal import rehearse
from trainfix.gradcopy.resident import Resident
from trainfix.gradcopy.ring import Ring
from trainfix.gradcopy.segments import Adder
from trainfix.gradcopy.tier import Tier

# What `auto` tries, in this order, by (gradients on a GPU, masters pinned).
ORDER = {
    (True, True): ("resident", "ring", "host-add", "torch"),
    (True, False): ("resident", "host-add", "torch"),
    (False, True): ("torch",),
    (False, False): ("torch",),
}
TIERS = ("auto", "resident", "ring", "host-add", "torch")


class Wish(NamedTuple):
    """What the user asks for. tier: auto, resident, ring, host-add or torch. budget: bytes on the device for resident
    sums, None: what is free. overlap: copies may run beside the caller's stream."""

    tier: str = "auto"
    budget: int | None = None
    overlap: bool = True


class Plan(NamedTuple):
    """What a tier is built from. adder: for sums on the device. elements: how many a slot holds."""

    device: Device
    adder: Adder
    wish: Wish
    pinned: bool
    elements: int


# Of a slot. Powers of two, which no allocator rounds up; in float32 32 MiB, in 16 bits half of it.
ELEMENTS = 1 << 23
_AT_REHEARSAL = 1 << 12


class Unfit(Exception):
    """A tier that cannot carry these gradients. The message says why."""


def choose(partitions: Sequence[torch.Tensor], device: torch.device, wish: Wish) -> tuple[Tier, str]:
    """The first tier in the order that fits and, on a GPU, has just given the right bits on it; torch always does.

    Raises ValueError for a tier that does not exist.
    """
    if wish.tier not in TIERS:
        raise ValueError(f"no such tier: {wish.tier!r}; there are {', '.join(TIERS)}")
    dtypes = {partition.dtype for partition in partitions}
    if dtypes - {torch.float32}:
        return Inline(TorchAdder()), f"the masters are {', '.join(sorted(map(str, dtypes)))}"
    if device.type not in ("cpu", "cuda"):
        return Inline(TorchAdder()), f"no other way is known from {device.type}"
    on_gpu, pinned = device.type == "cuda", all(partition.is_pinned() for partition in partitions)
    order = [name for name in ORDER[on_gpu, pinned] if wish.budget != 0 or name != "resident"]
    if wish.tier != "auto":
        order = [wish.tier, *(name for name in order if name not in (wish.tier, "resident"))]
    queues, adder, why_no_kernel = _hands(device)
    reasons = ["asked for" if wish.tier != "auto" else _situation(on_gpu, pinned), *why_no_kernel]
    plan = Plan(queues, adder, wish, pinned, ELEMENTS)
    for name in order:
        try:
            if on_gpu:
                rehearse(partial(build, name, plan._replace(elements=_AT_REHEARSAL)), device, pinned)
            return build(name, plan), "; ".join(reasons)
        except Exception as error:  # out of memory, a kernel that does not compile here, wrong bits
            reasons.append(f"not {name}: {error}")
    raise AssertionError("torch fits everywhere")


def build(name: str, plan: Plan) -> Tier:
    """A tier by its name. Raises Unfit, or torch.cuda.OutOfMemoryError."""
    device, adder, wish, pinned, elements = plan
    if name == "resident":
        below = "torch" if not device.asynchronous else "ring" if pinned else "host-add"
        return Resident(build(below, plan), device, adder, wish.budget)
    if name == "ring":
        if device.asynchronous and not pinned:
            raise Unfit("the masters are not pinned")
        return Ring(device, adder, overlap=wish.overlap, elements=elements)
    if name == "host-add":
        return HostAdd(device, host_adder(), overlap=wish.overlap, slot_bytes=2 * elements)
    return Inline(TorchAdder() if device.asynchronous else host_adder())


def _hands(device: torch.device) -> tuple[Device, Adder, list[str]]:
    """The queues and the adder of a device, and why it is no kernel."""
    if device.type == "cpu":
        return HostDevice(), host_adder(), []
    from trainfix.gradcopy import kernels
    from trainfix.gradcopy.cuda import CudaDevice

    try:
        return CudaDevice(device), kernels.adder(device), []
    except kernels.Unavailable as error:  # more launches, the same bits
        return CudaDevice(device), TorchAdder(), [f"added by torch: {error}"]


def _situation(on_gpu: bool, pinned: bool) -> str:
    if not on_gpu:
        return "the gradients are on the host"
    return "the masters are pinned" if pinned else "the masters are not pinned"
