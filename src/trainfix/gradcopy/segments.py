"""What a bucket brings: which part of which gradient goes where. And cutting it into pieces that fit a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    destination: [n], the whole stretch. gradients: what memory holds the gradients, merged where they adjoin, in any
    order. offsets: where each segment's gradient is once `gather` has put them together.
    """

    destination: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
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
        """These segments, the piece's own or `placed_at`'s, with the gradients at `memory`, [n]."""
        return [
            one._replace(gradient=memory.narrow(0, offset, one.gradient.numel()))
            for one, offset in zip(segments, self.offsets, strict=True)
        ]

    def gather(self, memory: torch.Tensor) -> None:
        """Copy the gradients to `memory`, [n], of their dtype: in as few copies as they lie in."""
        place = 0
        for gradient in self.gradients:
            memory.narrow(0, place, gradient.numel()).copy_(gradient, non_blocking=True)
            place += gradient.numel()


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
    alike = last.first == one.first and last.gradient.dtype == one.gradient.dtype
    return alike and _adjoin(last.destination, one.destination[done:])


def _piece(run: Sequence[Segment]) -> Piece:
    order = sorted(range(len(run)), key=lambda number: run[number].gradient.data_ptr())
    gradients, offsets, total = list[torch.Tensor](), [0] * len(run), 0
    for number in order:
        gradient = run[number].gradient
        offsets[number] = total
        total += gradient.numel()
        if gradients and _adjoin(gradients[-1], gradient):
            before = gradients.pop()
            gradient = _stretch(before, before.numel() + gradient.numel())
        gradients.append(gradient)
    return Piece(_stretch(run[0].destination, total), tuple(gradients), tuple(offsets), tuple(run))


def _adjoin(before: torch.Tensor, after: torch.Tensor) -> bool:
    end = before.data_ptr() + before.numel() * before.element_size()
    return end == after.data_ptr() and _storage(before) == _storage(after)


def _stretch(begin: torch.Tensor, elements: int) -> torch.Tensor:
    return begin.as_strided((elements,), (1,), begin.storage_offset())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
