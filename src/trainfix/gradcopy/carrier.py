"""One optimizer's way to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trainfix.gradcopy.arithmetic import squares_on_host
from trainfix.gradcopy.choice import Wish, choose
from trainfix.gradcopy.segments import Segment, check


class Carrier:
    """Carries the gradients of one optimizer's partition to its masters, window after window.

    partitions: the master gradients, flat, on the host. device: where the gradients are.
    Several optimizers have one each; not for several threads at once.
    """

    def __init__(self, partitions: Sequence[torch.Tensor], device: torch.device, wish: Wish | None = None) -> None:
        self._tier, self._why = choose(partitions, device, wish or Wish())

    @property
    def tier(self) -> str:
        return self._tier.name

    def explanation(self) -> str:
        """Which tier it is, and why."""
        return f"{self._tier.describe()} ({self._why})"

    def accumulate(self, segments: Sequence[Segment], *, last: bool = False) -> None:
        """Take a bucket: store or add each segment's gradient, in the masters' dtype, in the order of the calls.

        The gradients may be overwritten by what is queued on the current stream afterwards. The masters hold the sums
        after `wait`. last: the window's last gradients, as far as the caller knows. Raises ValueError, having touched
        nothing, where a segment's two sides differ in length or two segments have one key.
        """
        check(segments)
        wide = [one for one in segments if one.gradient.dtype.itemsize > one.destination.dtype.itemsize]
        if wide:  # rounded before they are added, as torch does it
            segments = [one._replace(gradient=one.gradient.to(one.destination.dtype)) for one in segments]
        self._tier.add(segments, last=last)

    def wait(self) -> None:
        """Until every sum stands in the masters. Raises what went wrong on the way."""
        self._tier.wait()

    def squares(self, slices: Mapping[int, torch.Tensor]) -> dict[int, float]:
        """Key -> sum of squares of that slice of the master gradient, in float64: not finite where an element is not.

        Taken on the way where the gradients came with `last`, else read from the host. Waits.
        """
        self._tier.wait()
        on_the_way = self._tier.squares()
        left = squares_on_host({key: slice for key, slice in slices.items() if key not in on_the_way})
        return {key: on_the_way[key] if key in on_the_way else left[key] for key in slices}

    def renew(self) -> None:
        """The window is over, or given up."""
        self._tier.renew()
