"""The sum itself, on the host: torch operations, one chunk at a time; any device's gradients, any master dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from trainfix.gradcopy.segments import Adder, Segment

# Adding bf16 to float32 in one call makes a float32 copy of the whole operand, in fresh pages each time. Chunks that
# stay in the cache take a fraction of the time: benchmarks/host_accumulate.py.
CHUNK_ELEMENTS = 1 << 16
# What crosses a link at once, in the gradient's own dtype: fewer bytes than after the cast, and few copies.
CROSSING_ELEMENTS = 1 << 22


class TorchAdder:
    """The tier that is always there, and what the others must equal bit for bit."""

    def parts(self, segments: Sequence[Segment]) -> list[int]:
        return [1] * len(segments)

    def add(self, segments: Sequence[Segment], squares: torch.Tensor | None = None) -> None:
        for number, (_, destination, gradient, first) in enumerate(segments):
            total = None if squares is None else squares[number].zero_()
            for into, piece in _chunks(destination, gradient):
                if first:
                    into.copy_(piece)
                else:
                    into.add_(piece if into.dtype is torch.float32 else piece.to(into.dtype))
                if total is not None:
                    total += torch.linalg.vector_norm(into, dtype=torch.float64).square()  # while it is in the cache


def _chunks(destination: torch.Tensor, gradient: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if destination.device.type != "cpu":
        yield destination, gradient
        return
    crossings = zip(torch.split(destination, CROSSING_ELEMENTS), torch.split(gradient, CROSSING_ELEMENTS), strict=True)
    for into, piece in crossings:
        here = piece.to(into.device)
        yield from zip(torch.split(into, CHUNK_ELEMENTS), torch.split(here, CHUNK_ELEMENTS), strict=True)


def host_adder() -> Adder:
    """The compiled loop where it is installed, else torch."""
    from trainfix.gradcopy import native

    return native.adder() or TorchAdder()


def squares_on_host(slices: Mapping[int, torch.Tensor]) -> dict[int, float]:
    """Key -> sum of squares in float64 of [n] on the host, without a float64 copy of it."""
    totals = torch.zeros(len(slices), dtype=torch.float64)
    for total, values in zip(totals, slices.values(), strict=True):
        for piece in torch.split(values, CHUNK_ELEMENTS):
            total += torch.linalg.vector_norm(piece, dtype=torch.float64).square()
    return dict(zip(slices, totals.tolist(), strict=True))
