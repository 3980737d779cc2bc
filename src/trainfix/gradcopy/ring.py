"""Pinned masters: stretches of the host partition visit the device, take their gradients, and go back.

Per stretch: copy engine in, one addition, copy engine out, each on a stream of its own, through a few slots, so that
both directions of the link are busy while the backward pass goes on. The gradients are first copied to a stage on the
caller's own stream: nothing later reads the caller's bucket, so it may be refilled or freed as soon as `add` returns.

Serially (TRAINFIX_OVERLAP=0) everything is on the caller's stream, in order, and no stage is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainfix.gradcopy.queues import Device, Event, Queue, Slots
from trainfix.gradcopy.segments import Adder, Piece, Segment, pieces
from trainfix.gradcopy.squares import Squares

# A slot holds a stretch in float32, a stage its gradients in any dtype.
SLOTS = 4
STAGES = 8


class Ring:
    """The masters on the host are read and written by the device."""

    name = "ring"

    def __init__(self, device: Device, adder: Adder, *, overlap: bool, elements: int) -> None:
        self._device, self._adder, self._elements = device, adder, elements
        self._overlap = overlap and device.asynchronous
        slots, stages = device.memory(SLOTS * elements * 4), None
        if self._overlap:
            stages = device.memory(STAGES * elements * 4)
            self._own: tuple[Queue, ...] = tuple(device.queue() for _ in range(3))
            for queue in self._own:
                queue.uses(slots)
                queue.uses(stages)
        self._slab, self._stage_slab = slots, stages
        self._slots = Slots(slots, SLOTS)
        self._stages = None if stages is None else Slots(stages, STAGES)
        self._written: dict[int, Event] = {}  # key -> its last stretch is back on the host
        self._squares = Squares()

    def describe(self) -> str:
        beside = "beside" if self._overlap else "in line with"
        held = sum(slab.numel() for slab in (self._slab, self._stage_slab) if slab is not None)
        return f"ring, copies {beside} the backward pass, {held >> 20} MiB on the device"

    def add(self, segments: Sequence[Segment], *, last: bool) -> None:
        self._squares.forget(segments)
        caller = self._device.caller()
        caller.uses(self._slab if self._stage_slab is None else self._stage_slab)
        written: dict[int, list[Event]] = {}
        for piece in pieces(segments, self._elements):
            event = self._carry(piece, caller, last=last)
            for one in piece.segments:
                written.setdefault(one.key, []).append(event)
        # Stretches leave in order, so the last one of a key is back after all others.
        self._written.update({key: events[-1] for key, events in written.items()})

    def _carry(self, piece: Piece, caller: Queue, *, last: bool) -> Event:
        inward, adding, outward = self._own if self._overlap else (caller,) * 3
        elements = piece.destination.numel()
        slot = self._slots.take(adding if piece.first else inward)
        here = slot.view(elements, torch.float32)
        segments = piece.placed_at(here)
        stage = None
        if self._stages is not None:
            stage = self._stages.take(caller)
            staged = stage.view(elements, piece.segments[0].gradient.dtype)
            caller.do(lambda: piece.gather(staged))
            adding.wait(caller.record())
            segments = piece.read_from(staged, segments)
        if not piece.first:
            for event in {event for one in piece.segments if (event := self._written.get(one.key))}:
                inward.wait(event)  # what an earlier micro-batch sends home is there before it is fetched again
            inward.do(lambda: here.copy_(piece.destination, non_blocking=True))
            adding.wait(inward.record())
        squares = self._squares.room(self._adder, segments, adding, here.device) if last else None
        adding.do(lambda: self._adder.add(segments, squares))
        if stage is not None:
            stage.release(adding)
        outward.wait(adding.record())
        outward.do(lambda: piece.destination.copy_(here, non_blocking=True))
        return slot.release(outward)

    def wait(self) -> None:
        if self._overlap:
            self._own[-1].record().synchronize()  # whatever goes home leaves by this queue
            return
        for event in set(self._written.values()):
            event.synchronize()

    def squares(self) -> dict[int, float]:
        return self._squares.read()

    def renew(self) -> None:
        self.wait()
        self._written.clear()
        self._squares.clear()
