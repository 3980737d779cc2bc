"""How each framework holds a model: where a backward's gradients arrive, and where its optimizer consumes them.

One small adapter per kind, and one way to read them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from trainfix.ledger.capture import Leaf
from trainfix.ledger.tensors import local, to_host

ALONE = object()


class Unreadable(Exception):
    """A model or an optimizer that no adapter reads. The message says what it is."""


class Home(NamedTuple):
    """Where this rank's optimizer consumes a parameter's gradient: in `holder.grad`, when it steps `holder`.

    Element e of the parameter is element e + shift of it, if begin <= e < end; the others are on other ranks.
    """

    holder: torch.Tensor
    shift: int
    begin: int
    end: int


class Part(NamedTuple):
    """The gradient at the sampled coordinates, parameter after parameter, and which of them this rank holds.

    consumed: float64 [elements] on the host, zero where this rank holds none. held: bool [elements].
    """

    consumed: torch.Tensor
    held: torch.Tensor


class Consumer(Protocol):
    """A model as its framework holds it, at the outermost module that the training loop calls.

    sizes: name -> elements of each whole parameter that is trained, the same on every rank. group: the process group
    that shares the work of a window (None is all ranks), or ALONE where this rank goes its own way.
    """

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def group(self) -> object: ...

    def leaves(self) -> Mapping[str, Leaf]:
        """Where each parameter's gradients arrive, without those of which only a forward pass will show it."""

    def owner(self, optimizer: torch.optim.Optimizer) -> object:
        """What the training loop steps when this torch optimizer steps: itself, or what has several of them."""

    def homes(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Home]:
        """The parameters whose gradients its owner consumes: none where it belongs to another model."""


def read(homes: Mapping[str, Home], sample: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """What is about to be consumed of these parameters, one transfer to the host for all."""
    found = []
    for name, home in homes.items():
        places = sample[name]
        held = (places >= home.begin) & (places < home.end)
        gradient = home.holder.grad
        if gradient is None:
            found.append((held, torch.zeros(int(held.sum()))))
        else:
            flat = local(gradient.detach()).reshape(-1)
            found.append((held, flat.index_select(0, (places[held] + home.shift).to(flat.device))))
    values = to_host([one for _, one in found])
    parts = {}
    for name, (held, _), value in zip(homes, found, values, strict=True):
        consumed = torch.zeros(len(held), dtype=torch.float64)
        consumed[held] = value
        parts[name] = Part(consumed, held)
    return parts


def itself(optimizer: torch.optim.Optimizer) -> object:
    """The owner of an optimizer that the loop steps."""
    return optimizer


def stepped(optimizer: torch.optim.Optimizer) -> frozenset[int]:
    """The ids of the tensors that an optimizer steps."""
    return frozenset(id(one) for group in optimizer.param_groups for one in group["params"])
