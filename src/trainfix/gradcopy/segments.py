"""What a bucket brings: which part of which gradient goes where. And cutting it into pieces that fit a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch


class Segment(NamedTuple):
    """One parameter's part of this rank's partition.

    key: which slice of the partition, a parameter's id. destination: [n] on the host, the master gradient's slice.
    gradient: [n] on any device, bfloat16, float16 or float32. first: the first gradient of the window in this slice is
    stored, later ones are added.
    """

    key: int
    destination: torch.Tensor
    gradient: torch.Tensor
    first: bool


class Adder(Protocol):
    """One pass over a bucket: accumulate, cast and, where asked for, the sums of squares of what it stores."""

    def parts(self, segments: Sequence[Segment]) -> list[int]:
        """How many partial sums of squares each segment gives."""

    def add(self, segments: Sequence[Segment], squares: torch.Tensor | None = None) -> None:
        """Store or add each segment's gradient in its destination: float32, each element by one owner, no host sync.

        squares: float64 [sum of parts] on the destinations' device, takes the partial sums of squares, segment after
        segment. In float64 no square of a float32 overflows, so a sum is finite exactly if every element is.
        """


class Piece(NamedTuple):
    """Segments whose destinations lie one behind the other, all of them first or none.

    destination: [n], the whole stretch. gradient: [n] where the gradients lie one behind the other as well, in any
    order, else None.
    """

    destination: torch.Tensor
    gradient: torch.Tensor | None
    segments: tuple[Segment, ...]

    @property
    def first(self) -> bool:
        return self.segments[0].first

    def placed_at(self, memory: torch.Tensor) -> list[Segment]:
        """The segments with `memory`, [n], in the stretch's place."""
        begin = self.destination.storage_offset()
        return [
            one._replace(destination=memory.narrow(0, one.destination.storage_offset() - begin, one.gradient.numel()))
            for one in self.segments
        ]

    def read_from(self, memory: torch.Tensor, segments: Sequence[Segment]) -> list[Segment]:
        """The segments with the gradients at `memory`, [n], where `gather` has put them."""
        begin = 0 if self.gradient is None else self.gradient.storage_offset()
        found, place = list[Segment](), 0
        for one in segments:
            offset = place if self.gradient is None else one.gradient.storage_offset() - begin
            found.append(one._replace(gradient=memory.narrow(0, offset, one.gradient.numel())))
            place += one.gradient.numel()
        return found

    def gather(self, memory: torch.Tensor) -> None:
        """Copy the gradients to `memory`, [n], of their dtype: in one copy where they lie together."""
        if self.gradient is not None:
            memory.copy_(self.gradient, non_blocking=True)
            return
        place = 0
        for one in self.segments:
            memory.narrow(0, place, one.gradient.numel()).copy_(one.gradient, non_blocking=True)
            place += one.gradient.numel()


def check(segments: Sequence[Segment]) -> None:
    """Raises ValueError where a segment's two sides differ, or where two segments have one key."""
    for one in segments:
        if one.destination.shape != one.gradient.shape:
            raise ValueError(
                f"a master gradient of shape {tuple(one.destination.shape)} cannot take a gradient of shape "
                f"{tuple(one.gradient.shape)}"
            )
    if len({one.key for one in segments}) < len(segments):
        raise ValueError("two gradients of one bucket go to the same slice of the partition")


def pieces(segments: Sequence[Segment], elements: int) -> Iterator[Piece]:
    """Cut a bucket into stretches of the partition of at most `elements`, so that a few large copies carry it."""
    run, length = list[Segment](), 0
    for one in sorted(segments, key=lambda one: one.destination.data_ptr()):
        done = 0
        while done < one.gradient.numel():
            if run and (length == elements or not _follows(run[-1], one, done)):
                yield _piece(run)
                run, length = [], 0
            count = min(elements - length, one.gradient.numel() - done)
            cut = one._replace(
                destination=one.destination.narrow(0, done, count), gradient=one.gradient.narrow(0, done, count)
            )
            run.append(cut)
            done += count
            length += count
    if run:
        yield _piece(run)


def _follows(last: Segment, one: Segment, done: int) -> bool:
    """Whether what is left of `one` goes right behind `last`."""
    end = last.destination.data_ptr() + last.destination.numel() * last.destination.element_size()
    begin = one.destination.data_ptr() + done * one.destination.element_size()
    alike = last.first == one.first and last.gradient.dtype == one.gradient.dtype
    return end == begin and alike and _storage(last.destination) == _storage(one.destination)


def _piece(run: Sequence[Segment]) -> Piece:
    gradients = sorted((one.gradient for one in run), key=lambda gradient: gradient.data_ptr())
    together = all(
        before.data_ptr() + before.numel() * before.element_size() == after.data_ptr()
        and _storage(before) == _storage(after)
        for before, after in pairwise(gradients)
    )
    total = sum(one.gradient.numel() for one in run)
    first = run[0].destination
    destination = first.as_strided((total,), (1,), first.storage_offset())
    gradient = gradients[0].as_strided((total,), (1,), gradients[0].storage_offset()) if together else None
    return Piece(destination, gradient, tuple(run))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
