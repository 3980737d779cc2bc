"""DeepSpeed's optimizers: ZeRO stages 0 to 3, with and without offload, and BF16_Optimizer.

All of them hand their gradients to a torch optimizer, which is where they are read. Up to stage 2 a group's parameters
lie in one flat buffer, of which each rank owns a part; in stage 3 each parameter is cut into a piece per rank. Groups
are stepped one by one, so a window is whole when all have been seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainfix.ledger.capture import Leaf
from trainfix.ledger.consumers import Home, Unreadable, itself


class DeepSpeed:
    """The engine that `deepspeed.initialize` returned."""

    owner = staticmethod(itself)

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._torch = getattr(engine.optimizer, "optimizer", engine.optimizer)
        named = engine.module.named_parameters()
        self._parameters = {name: one for name, one in named if one.requires_grad}
        if not all(getattr(one, "allreduce", True) for one in self._parameters.values()):
            raise Unreadable("expert parallelism: ranks hold other experts under the same names")
        buffers = _buffers(self._zero)
        self._homes = {name: _home(self._zero, one, buffers) for name, one in self._parameters.items()}

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: int(getattr(one, "ds_numel", one.numel())) for name, one in self._parameters.items()}

    @property
    def group(self) -> object:
        return getattr(self._zero, "dp_process_group", None)

    def leaves(self) -> Mapping[str, Leaf]:
        return {name: Leaf(one) for name, one in self._parameters.items()}

    def homes(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Home]:
        return self._homes if optimizer is self._torch else {}


def _buffers(zero: Any) -> list[torch.Tensor]:
    """What this rank's torch optimizer steps."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    groups: Any = zero.param_groups  # stage 0: each parameter, or its float32 copy
    return [one for group in groups for one in group["params"]]


def _home(zero: Any, parameter: Any, buffers: list[torch.Tensor]) -> Home:
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        buffer, start, _ = zero.grad_position[zero.get_param_id(parameter)]
        begin = torch.distributed.get_rank(zero.dp_process_group) * int(parameter.partition_numel())
        end = min(begin + int(parameter.partition_numel()), int(parameter.ds_numel))
        return Home(buffers[int(buffer)], int(start) - begin, begin, end)
    flats = getattr(zero, "bit16_groups_flat", getattr(zero, "bf16_groups_flat", None))
    if flats is None:
        models = [one for group in getattr(zero, "fp16_groups", [buffers]) for one in group]
        number = next(i for i, one in enumerate(models) if one is parameter)
        return Home(buffers[number], 0, 0, parameter.numel())
    for holder, flat in zip(buffers, flats, strict=False):
        start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= start < flat.numel():
            first = torch.distributed.get_rank(zero.dp_process_group) * holder.numel()
            begin, end = max(first - start, 0), min(first + holder.numel() - start, parameter.numel())
            return Home(holder, start - first, begin, max(begin, end))
    raise ValueError("a trained parameter is in no flat group of DeepSpeed's optimizer")
