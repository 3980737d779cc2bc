"""As much of the partition as a budget allows is summed on the device, in float32, and sent home once per window.

Stands in front of another tier, which takes the rest. What has begun a window there ends it there. Off in the first
window, whose peak of memory says what is free; given back, without losing a bit, as soon as memory runs short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from trainfix.gradcopy.queues import Device, Event
from trainfix.gradcopy.segments import Adder, Segment, pieces
from trainfix.gradcopy.squares import Squares
from trainfix.gradcopy.tier import Tier

_ALIGNED = 8  # elements: 16 bytes of the narrowest gradient, so that whole vectors are loaded and stored
_WHOLE = 1 << 62
_BYTES = 4


class Resident:
    """In front of `below`. budget: bytes on the device; None: what is free."""

    name = "resident"

    def __init__(self, below: Tier, device: Device, adder: Adder, budget: int | None) -> None:
        self._below, self._device, self._adder, self._budget = below, device, adder, budget
        self._home: dict[int, torch.Tensor] = {}  # key -> the master gradient's slice, as it was last seen
        self._places: dict[int, torch.Tensor] = {}  # key -> its sum on the device
        self._summed: dict[int, Event] = {}  # of this window -> its sum is whole when the event fires
        self._away: dict[int, Event] = {}  # sent home in this window, and there when the event fires
        self._slab: torch.Tensor | None = None
        self._outward = device.queue() if device.asynchronous else device.caller()
        self._pressure = 0
        self._refused = False
        self._squares = Squares()

    @property
    def elements(self) -> int:
        """How many elements of the partition have a place on the device."""
        return sum(place.numel() for place in self._places.values())

    def describe(self) -> str:
        if self._slab is not None:
            held = f"{self._slab.numel() >> 20} MiB on the device"
        else:
            held = "no memory is left on the device" if self._refused else "from the second window on"
        return f"resident, {held}; the rest by {self._below.describe()}"

    def add(self, segments: Sequence[Segment], *, last: bool) -> None:
        self._home.update((one.key, one.destination) for one in segments)
        if self._places and self._device.pressure() > self._pressure:
            self.spill()
        here = [one for one in segments if one.key in self._places and (one.first or one.key in self._summed)]
        mine = {one.key for one in here}
        if here:
            self._sum(here, last=last)
        if rest := [one for one in segments if one.key not in mine]:
            self._below.add(rest, last=last)

    def _sum(self, segments: Sequence[Segment], *, last: bool) -> None:
        assert self._slab is not None
        self._squares.forget(segments)
        caller = self._device.caller()
        caller.uses(self._slab)
        for event in {event for one in segments if (event := self._away.pop(one.key, None))}:
            caller.wait(event)  # a sum on its way home is not overwritten
        placed = [one._replace(destination=self._places[one.key]) for one in segments]
        squares = self._squares.room(self._adder, placed, caller, self._slab.device) if last else None
        caller.do(lambda: self._adder.add(placed, squares))
        self._summed.update(dict.fromkeys(mine := [one.key for one in segments], caller.record()))
        if last:
            self._send(mine)

    def _send(self, keys: Sequence[int]) -> None:
        """Sums of the device -> the masters, in as few copies as they lie in."""
        if not keys:
            return
        for event in {self._summed[key] for key in keys}:  # whichever stream the caller has turned to since
            self._outward.wait(event)
        sums = [Segment(key, self._home[key], self._places[key], True) for key in keys]
        for piece in pieces(sums, _WHOLE):
            self._outward.do(partial(piece.gather, piece.destination))
        event = self._outward.record()
        self._away.update(dict.fromkeys(keys, event))

    def wait(self) -> None:
        self._send([key for key in self._summed if key not in self._away])
        self._all_home()
        self._below.wait()

    def squares(self) -> dict[int, float]:
        return {**self._squares.read(), **self._below.squares()}

    def _all_home(self) -> None:
        self._outward.record().synchronize()

    def spill(self) -> None:
        """Give the memory back, for good. The sums of this window go home, and on in the next tier."""
        self._send([key for key in self._summed if key not in self._away])
        self._forget()
        self._places, self._slab, self._refused = {}, None, True

    def renew(self) -> None:
        self._forget()
        self._below.renew()
        if self._home and self._slab is None and not self._refused:
            self._take_places()

    def _forget(self) -> None:
        self._all_home()
        self._summed.clear()
        self._away.clear()
        self._squares.clear()

    def _take_places(self) -> None:
        """After the first window, at whose peak the rest of the training has shown what it needs."""
        room, limits = 0, [limit for limit in (self._budget, self._device.headroom()) if limit is not None]
        places = dict[int, int]()
        # In the masters' order: what lies together at home lies together here, and goes home in one copy.
        for key, master in sorted(self._home.items(), key=lambda item: item[1].data_ptr()):
            size = -(-master.numel() // _ALIGNED) * _ALIGNED
            if not limits or (room + size) * _BYTES <= min(limits):
                places[key] = room
                room += size
        try:
            self._slab = self._device.memory(room * _BYTES) if room else None
        except torch.cuda.OutOfMemoryError:
            self._slab = None
        if self._slab is None:
            self._refused = True
            return
        self._outward.uses(self._slab)
        self._pressure = self._device.pressure()
        sums = self._slab.view(torch.float32)
        self._places = {key: sums.narrow(0, begin, self._home[key].numel()) for key, begin in places.items()}
