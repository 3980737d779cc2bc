"""A bucket as rows of offsets: what a kernel reads to know which elements go where. Plain integers, no torch.

A row is at most BLOCK consecutive elements, and one program of a kernel adds it. Where a stretch of a segment begins at
a multiple of 16 bytes on both sides, the kernel moves 16 bytes at a time; what is left over at its ends, and segments
whose sides are shifted against one another, are rows of a second launch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

BODY_BLOCK = 4096  # elements of an aligned row
REST_BLOCK = 2048  # of any other: moved one by one, each element takes more registers
DESTINATION_VECTOR = 4  # float32 in 16 bytes


class Span(NamedTuple):
    """A segment as offsets, in elements, from two bases.

    gradient_base, destination_base: which bases. vector: the gradient's elements in 16 bytes, where both bases are at a
    multiple of 16 bytes, else 1. turned: stored where the bucket's first segment is added, or added where it is stored.
    """

    gradient_base: int
    destination_base: int
    gradient: int
    destination: int
    elements: int
    vector: int
    turned: bool


class Launch(NamedTuple):
    """The pair of bases and the variant of the kernel of one launch. vector: 1 where its rows are not aligned."""

    gradient_base: int
    destination_base: int
    vector: int
    turned: bool


class Table(NamedTuple):
    """rows: for each launch, four int64 a row: offset from the gradient's base, from the destination's, elements, and
    the place of the row's sum of squares. parts: how many rows each span has.
    """

    rows: dict[Launch, array[int]]
    parts: list[int]


def table(spans: Sequence[Span]) -> Table:
    """The launches of a bucket. The squares are numbered span after span, each from its first element to its last.

    Raises ValueError where two spans share an element of a destination: two programs would write it.
    """
    _check(spans)
    rows: dict[Launch, array[int]] = {}
    parts = list[int]()
    square = 0
    for span in spans:
        before = square
        for first, last, vector in _stretches(span):
            block = BODY_BLOCK if vector > 1 else REST_BLOCK
            begins = range(first, last, block)
            launch = Launch(span.gradient_base, span.destination_base, vector, span.turned)
            rows.setdefault(launch, array("q")).extend(
                chain.from_iterable(
                    (span.gradient + begin, span.destination + begin, min(block, last - begin), number)
                    for number, begin in enumerate(begins, start=square)
                )
            )
            square += len(begins)
        parts.append(square - before)
    return Table(rows, parts)


def _stretches(span: Span) -> Iterator[tuple[int, int, int]]:
    """(first element, past the last, vector) of what is before the aligned body, of it, and of what is behind it."""
    head = -span.gradient % span.vector
    body = max(span.elements - head, 0) // span.vector * span.vector
    if span.vector == 1 or (span.destination + head) % DESTINATION_VECTOR or not body:
        head, body = span.elements, 0
    parts = ((0, head, 1), (head, head + body, span.vector), (head + body, span.elements, 1))
    return (part for part in parts if part[0] < part[1])


def _check(spans: Sequence[Span]) -> None:
    places = sorted((span.destination_base, span.destination, span.elements) for span in spans if span.elements)
    for (base, begin, elements), (next_base, next_begin, _) in pairwise(places):
        if base == next_base and begin + elements > next_begin:
            raise ValueError("two gradients of one bucket go to the same elements of a master gradient")
