"""A torch optimizer that steps the model's own parameters, with DistributedDataParallel around the model or without."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from trainfix.ledger.capture import Leaf
from trainfix.ledger.consumers import Home, itself, stepped


class Plain:
    """Consumes `parameter.grad`."""

    def __init__(self, model: torch.nn.Module) -> None:
        named = model.named_parameters()  # a tied weight once, by its first name
        self._parameters = {name: one for name, one in named if one.requires_grad}
        parallel = sys.modules.get("torch.nn.parallel.distributed")
        shared = parallel is not None and isinstance(model, parallel.DistributedDataParallel)
        # Without it a group of ranks averages the gradients by itself: all of them count.
        self._group = model.process_group if shared else None

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: one.numel() for name, one in self._parameters.items()}

    @property
    def group(self) -> object:
        return self._group

    def leaves(self) -> Mapping[str, Leaf]:
        return {name: Leaf(one) for name, one in self._parameters.items()}

    def owner(self, optimizer: torch.optim.Optimizer) -> object:
        return itself(optimizer)

    def homes(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Home]:
        own = stepped(optimizer)
        return {name: Home(one, 0, 0, one.numel()) for name, one in self._parameters.items() if id(one) in own}
