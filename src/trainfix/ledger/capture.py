"""What each backward contributes at the sampled coordinates, seen before anyone accumulates or reduces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle


class Capture:
    """Listens to the gradients that arrive at parameters, while it is attached.

    A tensor hook gets the gradient that one backward brings, whatever the framework does with it afterwards. What is
    kept are a few elements of it, on its device and in its dtype: nothing waits, nothing is changed.
    Nested backwards of reentrant checkpointing belong to the one that is under way.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], sample: Mapping[str, torch.Tensor]) -> None:
        self._parameters, self._sample = parameters, sample
        self._handles: list[RemovableHandle] = []
        self._places: dict[str, torch.Tensor] = {}
        self._rows: list[dict[str, torch.Tensor]] = []
        self._open = False

    def attach(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                handle = parameter.register_hook(partial(self._arrived, name))  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def detach(self) -> None:
        """Take every hook out again. What was captured stays until `take`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[dict[str, torch.Tensor]]:
        """One entry per backward since the last call, in order: name -> the contribution at its coordinates."""
        rows, self._rows, self._open = self._rows, [], False
        return rows

    def _arrived(self, name: str, gradient: torch.Tensor) -> None:
        if not self._open:
            self._open = True
            self._rows.append({})
            # Runs when the backward that is under way is through.
            torch.autograd.Variable._execution_engine.queue_callback(self._close)
        row = self._rows[-1]
        place = self._places.get(name)
        if place is None or place.device != gradient.device:
            place = self._places[name] = self._sample[name].to(gradient.device)
        part = gradient.detach().reshape(-1).index_select(0, place)
        # Within one backward a parameter may be met again: a shared one under reentrant checkpointing.
        row[name] = part if name not in row else row[name] + part

    def _close(self) -> None:
        self._open = False


def stacked(
    rows: Sequence[Mapping[str, torch.Tensor]], sample: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contributions float64 [backwards, elements] on the host, and the parameter's number of each element [elements].

    A parameter that a backward did not use has contributed zero.
    """
    sizes = [len(places) for places in sample.values()]
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    table = torch.zeros(len(rows), sum(sizes), dtype=torch.float64)
    for row, into in zip(rows, table, strict=True):
        for name, part in zip(sample, into.split(sizes), strict=True):
            if name in row:
                part.copy_(row[name])
    return table, numbers
