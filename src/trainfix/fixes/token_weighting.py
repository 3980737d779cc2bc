"""Every trained token of a window counts the same, wherever it landed: the arithmetic that the loss repairs share.

What must reach the optimizer is the gradient of (sum of the trained tokens' losses) / (number of trained tokens), over
all ranks and all micro-batches of the window. So the number of tokens must be known before the first backward:
`LookAhead` reads the window's micro-batches on the host, and `over_ranks` adds the counts up, once per window. What a
backend divides by is in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

IGNORED = -100  # the label of a token that is not trained, in torch's cross-entropy and everywhere above it


@dataclass(frozen=True)
class Backend:
    """What happens to a micro-batch's gradient between its `backward` and the optimizer.

    divides: it is divided by the configured number of accumulation steps, also in a window with fewer micro-batches.
    averages: it is averaged over the data-parallel ranks (not over those of a sequence-parallel group, whose gradients
    are parts of one micro-batch's and are added up by the gather of its outputs).
    """

    divides: bool
    averages: bool

    def factor(self, *, steps: int, ranks: int) -> int:
        """What (sum of a micro-batch's losses) / (tokens of the window) must be multiplied by to come out right."""
        return (steps if self.divides else 1) * (ranks if self.averages else 1)


# Who calls `backward`, and how -> what it does. `steps` is what that backend was configured with.
BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "deepspeed": Backend(divides=True, averages=True),  # engine.backward(loss)
        "deepspeed, scale_wrt_gas=False": Backend(divides=False, averages=True),
        "accelerate": Backend(divides=True, averages=True),  # Accelerator(gradient_accumulation_steps=n), and DDP
        "accelerate, one step": Backend(divides=False, averages=True),
        "sum": Backend(divides=False, averages=False),  # reductions without averaging
    }
)


def trained(labels: Any) -> Any:
    """The tokens of a batch that a causal language model is trained on: a 0-dim int64 tensor where `labels`
    [rows, length] are, so nobody waits for a device.

    The first label of a row is never predicted.
    """
    return (labels[..., 1:] != IGNORED).sum()


def over_ranks(tokens: Any, group: Any = None, device: Any = None, *, dtype: Any = None) -> Any:
    """The sum of `tokens` over the process group (default: all ranks), a 0-dim int64 tensor on `device`.

    `tokens` is a number, or a tensor where they were counted on the device; it may be overwritten. One small
    all-reduce, and the host does not wait for it. Without a group, the number itself as such a tensor.
    `dtype` is a floating one where tokens have weights.
    """
    import torch
    from torch import distributed

    total = torch.as_tensor(tokens, dtype=dtype or torch.int64, device=device)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1:
        distributed.all_reduce(total, group=group)
    return total


class LookAhead:
    """Hands out micro-batches window by window; `total` is the window's number of tokens over all ranks.

    It holds at most one window of them, as its source made them. One that is not complete when the source ends waits
    for the source's next turn, as the engine's own window does; so a last, incomplete one is never handed out.

    length: the micro-batches in a window. first: those in the first window, where the engine is in mid-window already.
    count: the trained tokens of a micro-batch, on the host. add_up: `over_ranks`, for the run's group and device.
    """

    def __init__(
        self, length: int, count: Callable[[Any], Any], add_up: Callable[[Any], Any], *, first: int | None = None
    ) -> None:
        self.length, self._count, self._add_up = length, count, add_up
        self._missing = first or length
        self._held: list[Any] = []
        self.total: Any = None

    def __call__(self, source: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of one turn of `source`, an epoch, each when its whole window has been seen."""
        for batch in source:
            self._held.append(batch)
            self._missing -= 1
            if not self._missing:
                yield from self._window()

    def _window(self) -> Iterator[Any]:
        self.total = self._add_up(sum(map(self._count, self._held)))
        self._missing = self.length
        while self._held:
            yield self._held.pop(0)
