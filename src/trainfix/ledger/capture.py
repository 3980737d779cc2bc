"""What each backward contributes at the sampled coordinates, seen before anyone accumulates or reduces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from trainfix.ledger.tensors import guarded, local, to_host

# An overflow fills a row or a column of a weight's gradient: in large ones every 61st element meets each of them.
_STRIDE, _SMALL = 61, 2**16
LARGEST = 32 * 2**20  # bytes of samples that a rank keeps: a window that brings more cannot be judged


class Leaf(NamedTuple):
    """Where a parameter's gradient arrives: from element `offset` of what comes to `tensor`, seen as flat."""

    tensor: torch.Tensor
    offset: int = 0


@dataclass
class Row:
    """One backward. samples: name -> its contribution at the coordinates. sums: what is not finite anywhere shows.
    is_accumulated: it went into the parameters' `grad`, and was not asked for by torch.autograd.grad.
    """

    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: list[torch.Tensor] = field(default_factory=list)
    is_accumulated: bool = False


class Capture:
    """Listens to the gradients that arrive at parameters, while it is attached.

    A tensor hook gets the gradient that one backward brings, whatever the framework does with it afterwards. What is
    kept are a few elements of it, on its device and in its dtype: nothing waits, nothing is changed.
    Nested backwards of reentrant checkpointing belong to the one that is under way.
    """

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._watched: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        self._attached = False
        self._places: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._rows: list[Row] = []
        self._forgotten = 0
        self._bytes = 0
        self._open = False

    def watch(self, leaves: Mapping[str, Leaf], sample: Mapping[str, torch.Tensor]) -> None:
        """Look at these parameters too, at the coordinates that `sample` has for their names."""
        for name, leaf in leaves.items():
            _, places = self._watched.setdefault(id(leaf.tensor), (leaf.tensor, {}))
            if name in places:
                continue
            places[name] = sample[name] + leaf.offset
            if self._attached and len(places) == 1:
                self._hook(leaf.tensor)

    def attach(self) -> None:
        if not self._attached:
            self._attached = True
            for tensor, _ in self._watched.values():
                self._hook(tensor)

    def clear(self) -> None:
        """Take every hook out again, and forget what was watched and captured."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached = False
        self._watched.clear()
        self._places.clear()
        self.forget(self.count)

    @property
    def count(self) -> int:
        """How many backwards have been seen so far."""
        return self._forgotten + len(self._rows)

    @property
    def full(self) -> bool:
        """Whether a window brought more than is kept: its later backwards are missing."""
        return self._bytes > LARGEST

    def since(self, number: int) -> list[Row]:
        """The backwards from that one on, in order."""
        return self._rows[max(0, number - self._forgotten) :]

    def forget(self, number: int) -> None:
        """Let go of the backwards before that one."""
        del self._rows[: max(0, number - self._forgotten)]
        self._forgotten = max(self._forgotten, number)
        self._bytes = sum(one.nbytes for row in self._rows for one in row.samples.values())
        self._open = False

    def current(self) -> int:
        """The number of the backward that is under way. To be called within one."""
        if not self._open:
            self._open = True
            self._rows.append(Row())
            # Runs when the backward that is under way is through.
            torch.autograd.Variable._execution_engine.queue_callback(self._close)
        return self.count - 1

    def _close(self) -> None:
        self._open = False

    def _hook(self, tensor: torch.Tensor) -> None:
        key = id(tensor)

        def arrived(gradient: torch.Tensor) -> None:
            self._arrived(key, gradient)

        def accumulated(_: torch.Tensor) -> None:
            if self._open:
                self._rows[-1].is_accumulated = True

        self._handles.append(
            tensor.register_post_accumulate_grad_hook(guarded(accumulated, self._failed))  # type: ignore[no-untyped-call]
        )
        self._handles.append(tensor.register_hook(guarded(arrived, self._failed)))  # type: ignore[no-untyped-call]

    def _arrived(self, key: int, gradient: torch.Tensor) -> None:
        self.current()
        if self.full:
            return
        row = self._rows[-1]
        names = self._watched[key][1]
        gradient = local(gradient.detach())
        where = self._places.get((key, gradient.device))
        if where is None or len(where) != sum(map(len, names.values())):
            where = self._places[key, gradient.device] = torch.cat(list(names.values())).to(gradient.device)
        found = gradient.reshape(-1).index_select(0, where)
        self._bytes += found.nbytes
        for name, part in zip(names, torch.split(found, [len(one) for one in names.values()]), strict=True):
            # Within one backward a parameter may be met again: a shared one under reentrant checkpointing.
            row.samples[name] = part if name not in row.samples else row.samples[name] + part
        row.sums.append(gradient.reshape(-1)[:: _STRIDE if gradient.numel() > _SMALL else 1].sum(dtype=torch.float32))


def stacked(rows: Sequence[Row], sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Contributions float64 [backwards, elements] on the host, of the parameters in `sample`, one after the other.

    A parameter that a backward did not use has contributed zero.
    """
    there = [(number, name) for number, row in enumerate(rows) for name in sample if name in row.samples]
    sizes = [len(places) for places in sample.values()]
    table = torch.zeros(len(rows), sum(sizes), dtype=torch.float64)
    into = [dict(zip(sample, torch.split(row, sizes), strict=True)) for row in table]
    for (number, name), part in zip(there, to_host([rows[n].samples[name] for n, name in there]), strict=True):
        into[number][name].copy_(part)
    return table


def finite(rows: Sequence[Row]) -> list[bool]:
    """Whether everything that each backward brought was finite."""
    sums = iter(to_host([one.reshape(1) for row in rows for one in row.sums]))
    each = [[bool(torch.isfinite(next(sums))) for _ in row.sums] for row in rows]
    return [all(found) for found in each]
