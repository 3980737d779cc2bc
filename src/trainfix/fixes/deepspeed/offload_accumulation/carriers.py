"""The way that each optimizer's gradients take to the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from trainfix.engine import finder, report

if TYPE_CHECKING:
    from trainfix.gradcopy import Carrier

known: WeakKeyDictionary[Any, Carrier] = WeakKeyDictionary()


def of(optimizer: Any) -> Carrier:
    """The optimizer's carrier, made when the optimizer is: its memory is pinned before anyone communicates.

    Its master gradients exist from then on, and stay where they are.
    """
    carrier = known.get(optimizer)
    if carrier is None:
        carrier = known[optimizer] = _carrier(optimizer)
    return carrier


def _carrier(optimizer: Any) -> Carrier:
    import torch
    from deepspeed.accelerator import get_accelerator

    import trainfix
    from trainfix.gradcopy import Carrier, Wish

    settings = finder.current
    masters = [partition.grad for partition in optimizer.single_partition_of_fp32_groups]
    wish = Wish(settings.gradcopy, settings.gradcopy_budget, settings.overlap)
    carrier = Carrier(masters, torch.device(get_accelerator().current_device_name()), wish)
    if not settings.quiet:
        report.inform(f"trainfix {trainfix.__version__}: offloaded gradients are carried by {carrier.explanation()}")
    return carrier


def notes() -> Iterator[str]:
    """What `trainfix.status()` says of the optimizers that are there."""
    yield from dict.fromkeys(f"gradients carried by {carrier.explanation()}" for carrier in list(known.values()))
