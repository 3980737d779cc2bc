"""Which coordinates are looked at: a few of every parameter, the same on every rank and in every window."""

from __future__ import annotations

from collections.abc import Mapping

import torch

LEAST = 8  # of every parameter tensor
TOTAL = 4096  # over all of them, more where there are many tensors
SEED = 20_260_423


def draw(sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Name -> sorted int64 coordinates of that parameter, seen as flat: [at least LEAST, or all it has].

    sizes: name -> elements of the whole parameter, not of a rank's shard; every rank must give the same. What is left
    of TOTAL goes to the parameters by their size. A parameter's coordinates depend on its size and place alone.
    """
    spare = max(0, TOTAL - LEAST * len(sizes))
    elements = max(1, sum(sizes.values()))
    chosen = dict[str, torch.Tensor]()
    for number, (name, size) in enumerate(sizes.items()):
        count = min(size, LEAST + spare * size // elements)
        generator = torch.Generator().manual_seed(SEED + number)
        # One from each of `count` equal stretches: spread over rows and columns, and never the same twice.
        edges = torch.arange(count + 1, dtype=torch.int64) * size // max(1, count)
        widths = edges[1:] - edges[:-1]
        offsets = (torch.rand(count, generator=generator, dtype=torch.float64) * widths).to(torch.int64)
        chosen[name] = edges[:-1] + torch.minimum(offsets, widths - 1)
    return chosen
