"""FSDP2: `torch.distributed.fsdp.fully_shard`, with and without CPU offload.

Gradients arrive at whole parameters, each of which exists from the first forward pass on that uses it, and are consumed
as DTensors, of which each rank holds some rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainfix.ledger.capture import Leaf
from trainfix.ledger.consumers import Home, itself, stepped


class FullyShard:
    """The root of a model whose modules were given to `fully_shard`."""

    owner = staticmethod(itself)

    def __init__(self, model: Any) -> None:
        self._model = model
        named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._sharded: dict[str, Any] = named

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: one.numel() for name, one in self._sharded.items()}

    @property
    def group(self) -> object:
        meshes = {one.device_mesh for one in self._sharded.values() if hasattr(one, "device_mesh")}
        mesh: Any = meshes.pop() if len(meshes) == 1 else None
        return mesh.get_group() if mesh is not None and mesh.ndim == 1 else None

    def leaves(self) -> Mapping[str, Leaf]:
        whole: dict[int, torch.Tensor | None] = {}
        for module in self._model.modules():
            state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
            for one in _sharded_parameters(state):
                whole[id(one.sharded_param)] = getattr(one, "_unsharded_param", None)
        # Parameters that were left out of the sharding are their own.
        places = {name: whole.get(id(one), one) for name, one in self._sharded.items()}
        return {name: Leaf(place) for name, place in places.items() if place is not None}

    def homes(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Home]:
        own = stepped(optimizer)
        return {name: _home(one) for name, one in self._sharded.items() if id(one) in own}


def _sharded_parameters(state: Any) -> list[Any]:
    """What FSDP keeps for each parameter of one module; up to torch 2.9 a module has one group of them."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = getattr(state, "_fsdp_param_group", None)
        groups = [] if group is None else [group]
    return [one for group in groups for one in group.fsdp_params]


def _home(parameter: Any) -> Home:
    """Raises ValueError for a layout other than rows spread over the ranks."""
    if not hasattr(parameter, "device_mesh"):
        return Home(parameter, 0, 0, parameter.numel())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    if tuple(shape[1:]) != tuple(parameter.shape[1:]):
        raise ValueError(f"a parameter is placed as {placements}, not sharded by its first dimension")
    row = parameter.numel() // max(1, parameter.shape[0]) if parameter.dim() else 1
    begin = offset[0] * row if parameter.dim() else 0
    end = begin + (shape[0] * row if parameter.dim() else 1)
    return Home(parameter, -begin, begin, end)
