"""Carrying gradients from the device into the optimizer's master gradient on the host.

One call per bucket. This is the plain tier: torch operations, chunked, and blocking on the current stream, so the
caller's bucket may be refilled as soon as `accumulate` returns. Knows nothing of advisories or of DeepSpeed. Imports
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Adding bf16 to float32 in one call makes a float32 copy of the whole operand, in fresh pages each time. Chunks that
# stay in the cache take a fraction of the time: benchmarks/host_accumulate.py.
CHUNK_ELEMENTS = 1 << 18


class Segment(NamedTuple):
    """One parameter's part of this rank's partition.

    destination: [n] on the host, the master gradient's slice. gradient: [n] on any device, any floating dtype.
    first: the first gradient of the window in this slice is stored, later ones are added.
    """

    destination: torch.Tensor
    gradient: torch.Tensor
    first: bool


def accumulate(segments: Sequence[Segment]) -> None:
    """Store or add each segment's gradient, in order, in the destination's dtype (float32, or narrower masters').

    Raises ValueError, having touched nothing, when a segment's two sides differ in length.
    """
    for segment in segments:
        if segment.destination.shape != segment.gradient.shape:
            raise ValueError(
                f"a master gradient of shape {tuple(segment.destination.shape)} cannot take a gradient of shape "
                f"{tuple(segment.gradient.shape)}"
            )
    for destination, gradient, first in segments:
        pieces = zip(torch.split(destination, CHUNK_ELEMENTS), torch.split(gradient, CHUNK_ELEMENTS), strict=True)
        for into, piece in pieces:
            piece = piece.to(into.device)  # in the gradient's own dtype: fewer bytes over the link than after the cast
            if first:
                into.copy_(piece)
            else:
                into.add_(piece.to(into.dtype))


def norm(gradient: torch.Tensor) -> torch.Tensor:
    """L2 norm of a host tensor, a float64 scalar, without a float64 copy of it. Not finite if any element is not."""
    parts = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in torch.split(gradient, CHUNK_ELEMENTS)]
    return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros((), dtype=torch.float64)
