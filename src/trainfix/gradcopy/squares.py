"""Sums of squares that were taken on the way, by key: of the last gradient of a window only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainfix.gradcopy.queues import Queue
from trainfix.gradcopy.segments import Adder, Segment


class Squares:
    """Partial sums wait where they were made until they are read, all at once."""

    def __init__(self) -> None:
        self._partial: dict[int, list[tuple[torch.Tensor, int, int]]] = {}

    def forget(self, segments: Sequence[Segment]) -> None:
        """What is known of these keys is no longer the sum."""
        for one in segments:
            self._partial.pop(one.key, None)

    def room(self, adder: Adder, segments: Sequence[Segment], queue: Queue, device: torch.device) -> torch.Tensor:
        """float64 [sum of parts] for the partial sums of these segments, which `queue` makes and `read` adds up."""
        parts = adder.parts(segments)
        room = torch.empty(sum(parts), dtype=torch.float64, device=device)
        queue.uses(room)
        begin = 0
        for one, count in zip(segments, parts, strict=True):
            self._partial.setdefault(one.key, []).append((room, begin, count))
            begin += count
        return room

    def read(self) -> dict[int, float]:
        """Key -> sum of squares. One copy to the host for all."""
        rooms = {id(room): room for partial in self._partial.values() for room, _, _ in partial}
        if not rooms:
            return {}
        on_host = torch.cat(list(rooms.values())).cpu()
        begins, begin = dict[int, int](), 0
        for name, room in rooms.items():
            begins[name] = begin
            begin += room.numel()
        parts = [
            on_host.narrow(0, begins[id(room)] + offset, count).sum()
            for partial in self._partial.values()
            for room, offset, count in partial
        ]
        sums = torch.stack(parts).tolist()
        found, place = dict[int, float](), 0
        for key, partial in self._partial.items():
            found[key] = sum(sums[place : place + len(partial)])
            place += len(partial)
        return found

    def clear(self) -> None:
        self._partial.clear()
