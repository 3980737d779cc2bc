"""Masters that no device can reach, and slow links: the gradients cross in their own 16 bits, and a thread of the host
adds them beside the training loop.

Half the ring's bytes in one direction and none in the other; in return the host's memory does the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainfix.gradcopy.queues import Device, Event, Queue, Slots, Worker
from trainfix.gradcopy.segments import Adder, Piece, Segment, pieces
from trainfix.gradcopy.squares import Squares

SLOTS = 8
_HOST = torch.device("cpu")


class HostAdd:
    """The host adds. Serially (TRAINFIX_OVERLAP=0) each bucket's sums stand in the masters when `add` returns."""

    name = "host-add"

    def __init__(
        self, device: Device, adder: Adder, worker: Worker | None = None, *, overlap: bool, slot_bytes: int
    ) -> None:
        self._device, self._adder, self._slot_bytes, self._overlap = device, adder, slot_bytes, overlap
        self._worker = Worker() if worker is None else worker
        # Pinned once and for all, as one slab.
        self._slots = Slots(device.host_memory(SLOTS * slot_bytes), SLOTS)
        self._link: Queue | None = None
        if overlap and device.asynchronous:
            self._link = device.queue()
            self._stage_slab = device.memory(SLOTS * slot_bytes)
            self._link.uses(self._stage_slab)
            self._stages = Slots(self._stage_slab, SLOTS)
        self._last: Event | None = None
        self._squares = Squares()

    def describe(self) -> str:
        return f"host-add, in a thread, {SLOTS * self._slot_bytes >> 20} MiB between device and host"

    def add(self, segments: Sequence[Segment], *, last: bool) -> None:
        self._squares.forget(segments)
        caller = self._device.caller()
        if self._link is not None:
            caller.uses(self._stage_slab)
        for dtype in {one.gradient.dtype: None for one in segments}:
            alike = [one for one in segments if one.gradient.dtype == dtype]
            for piece in pieces(alike, self._slot_bytes // dtype.itemsize):
                self._carry(piece, caller, last=last)
        if not self._overlap and self._last is not None:
            self._last.synchronize()

    def _carry(self, piece: Piece, caller: Queue, *, last: bool) -> None:
        elements, dtype = piece.destination.numel(), piece.segments[0].gradient.dtype
        link = caller if self._link is None else self._link
        slot = self._slots.take(link)  # the host waits here when the thread is behind by all slots
        here = slot.view(elements, dtype)
        if self._link is None:
            link.do(lambda: piece.gather(here))
        else:
            stage = self._stages.take(caller)
            staged = stage.view(elements, dtype)
            caller.do(lambda: piece.gather(staged))
            link.wait(caller.record())
            link.do(lambda: here.copy_(staged, non_blocking=True))
            stage.release(link)
        segments = piece.read_from(here, piece.segments)
        squares = self._squares.room(self._adder, segments, self._worker, _HOST) if last else None
        self._worker.wait(link.record())
        self._worker.do(lambda: self._adder.add(segments, squares))
        self._last = slot.release(self._worker)

    def wait(self) -> None:
        if self._last is not None:
            self._last.synchronize()

    def squares(self) -> dict[int, float]:
        return self._squares.read()

    def renew(self) -> None:
        self._worker.reset()
        self._slots.forget()
        self._last = None
        self._squares.clear()
