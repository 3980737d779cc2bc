"""torchao's CPUOffloadOptimizer: a torch optimizer on the host for each large parameter, one on the device for the
rest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from trainfix.ledger.consumers import Home
from trainfix.ledger.consumers.plain import Plain
from trainfix.ledger.tensors import alive

_MODULES = ("torchao.optim.cpu_offload", "torchao.prototype.low_bit_optim.cpu_offload")


def of(model: torch.nn.Module) -> Any:
    """The CPUOffloadOptimizer that has parameters of this model, or None."""
    kinds = tuple(sys.modules[name].CPUOffloadOptimizer for name in _MODULES if name in sys.modules)
    own = {id(one) for one in model.parameters()}
    for one in alive(*kinds):
        if own & {id(parameter) for parameter in one.param_d2h_map}:
            return one
    return None


class Offloaded(Plain):
    """Consumes what was copied to the host."""

    def __init__(self, model: torch.nn.Module, offload: Any) -> None:
        super().__init__(model)
        self._offload = offload
        self._host: Mapping[torch.Tensor, torch.Tensor] = offload.param_d2h_map

    def owner(self, optimizer: torch.optim.Optimizer) -> object:
        inner = [*self._offload.optim_dict.values(), self._offload.d_opt]
        return self._offload if any(one is optimizer for one in inner) else optimizer

    def homes(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Home]:
        if self.owner(optimizer) is not self._offload:
            return super().homes(optimizer)
        host = {id(device): own for device, own in self._host.items()}
        named = self._parameters.items()
        return {name: Home(host.get(id(one), one), 0, 0, one.numel()) for name, one in named}
