"""A torch optimizer that steps the model's own parameters, with DistributedDataParallel around the model or without."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from trainfix.ledger.consumers import ALONE, Part


class Plain:
    """Consumes `parameter.grad`."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        named = model.named_parameters()  # a tied weight once, by its first name
        self._parameters = {name: one for name, one in named if one.requires_grad and id(one) in stepped}
        parallel = sys.modules.get("torch.nn.parallel.distributed")
        shared = parallel is not None and isinstance(model, parallel.DistributedDataParallel)
        self._group = model.process_group if shared else ALONE

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        return self._parameters

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: one.numel() for name, one in self._parameters.items()}

    @property
    def group(self) -> object:
        return self._group

    @property
    def steppers(self) -> tuple[torch.optim.Optimizer, ...]:
        return (self._optimizer,)

    def read(self, optimizer: torch.optim.Optimizer, sample: Mapping[str, torch.Tensor]) -> Part | None:
        parts = [torch.zeros(0, dtype=torch.float64)]
        for name, places in sample.items():
            gradient = self._parameters[name].grad
            if gradient is None:
                parts.append(torch.zeros(len(places), dtype=torch.float64))
            else:
                flat = gradient.detach().reshape(-1)
                parts.append(flat.index_select(0, places.to(flat.device)).to("cpu", torch.float64))
        found = torch.cat(parts)
        return Part(found, torch.ones(len(found), dtype=torch.bool))
