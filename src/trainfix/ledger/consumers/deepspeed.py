"""DeepSpeed's optimizers: ZeRO stages 0 to 3, with and without offload, and BF16_Optimizer.

All of them hand their gradients to a torch optimizer, which is where they are read. Up to stage 2 a group's parameters
lie in one flat buffer, of which each rank owns a part; in stage 3 each parameter is cut into a piece per rank. Groups
are stepped one by one, so a window is whole when all have been seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from trainfix.ledger.consumers import Part


class _Home(NamedTuple):
    """Where a parameter's gradient is consumed: in flat buffer `buffer` of this rank.

    Element e of the parameter is element e + shift of the buffer, if begin <= e < end; others are on other ranks.
    """

    buffer: int
    shift: int
    begin: int
    end: int


class DeepSpeed:
    """The engine that `deepspeed.initialize` returned."""

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._torch = getattr(engine.optimizer, "optimizer", engine.optimizer)
        named = engine.module.named_parameters()
        self._parameters = {name: one for name, one in named if one.requires_grad}
        self._buffers = _buffers(self._zero, list(self._parameters.values()))
        self._homes = {name: _home(self._zero, one, self._buffers) for name, one in self._parameters.items()}
        self._seen: dict[int, torch.Tensor] = {}

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        return self._parameters

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: int(getattr(one, "ds_numel", one.numel())) for name, one in self._parameters.items()}

    @property
    def group(self) -> object:
        return getattr(self._zero, "dp_process_group", None)

    @property
    def steppers(self) -> tuple[torch.optim.Optimizer, ...]:
        return (self._torch,)

    def read(self, optimizer: torch.optim.Optimizer, sample: Mapping[str, torch.Tensor]) -> Part | None:
        for buffer in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            number = next((i for i, own in enumerate(self._buffers) if own is buffer), None)
            if number is not None and buffer.grad is not None:
                self._take(number, buffer.grad, sample)
        if len(self._seen) < len(self._buffers):
            return None
        parts = list(self._parts(sample))
        self._seen.clear()
        empty = torch.zeros(0, dtype=torch.float64)
        consumed = torch.cat([empty, *(values for values, _ in parts)])
        return Part(consumed, torch.cat([empty.bool(), *(held for _, held in parts)]))

    def _take(self, number: int, gradient: torch.Tensor, sample: Mapping[str, torch.Tensor]) -> None:
        """The sampled elements of this buffer, parameter after parameter."""
        places = [
            places[(places >= home.begin) & (places < home.end)] + home.shift
            for (_, places), home in zip(sample.items(), self._homes.values(), strict=True)
            if home.buffer == number
        ]
        wanted = torch.cat([torch.zeros(0, dtype=torch.int64), *places]).to(gradient.device)
        self._seen[number] = gradient.detach().reshape(-1).index_select(0, wanted).to("cpu", torch.float64)

    def _parts(self, sample: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        begins = dict.fromkeys(self._seen, 0)
        for places, home in zip(sample.values(), self._homes.values(), strict=True):
            held = (places >= home.begin) & (places < home.end)
            count = int(held.sum())
            begin = begins[home.buffer]
            begins[home.buffer] = begin + count
            values = torch.zeros(len(places), dtype=torch.float64)
            values[held] = self._seen[home.buffer][begin : begin + count]
            yield values, held


def _buffers(zero: Any, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank's torch optimizer steps."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    groups: Any = zero.param_groups  # stage 0: each parameter, or its float32 copy
    return [one for group in groups for one in group["params"]]


def _home(zero: Any, parameter: Any, buffers: list[torch.Tensor]) -> _Home:
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        buffer, start, _ = zero.grad_position[zero.get_param_id(parameter)]
        begin = torch.distributed.get_rank(zero.dp_process_group) * int(parameter.partition_numel())
        end = min(begin + int(parameter.partition_numel()), int(parameter.ds_numel))
        return _Home(int(buffer), int(start) - begin, begin, end)
    flats = getattr(zero, "bit16_groups_flat", getattr(zero, "bf16_groups_flat", None))
    if flats is None:
        models = [one for group in getattr(zero, "fp16_groups", [buffers]) for one in group]
        return _Home(next(i for i, one in enumerate(models) if one is parameter), 0, 0, parameter.numel())
    for buffer, flat in enumerate(flats):
        start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= start < flat.numel():
            size = buffers[buffer].numel()
            first = torch.distributed.get_rank(zero.dp_process_group) * size
            begin, end = max(first - start, 0), min(first + size - start, parameter.numel())
            return _Home(buffer, start - first, begin, max(begin, end))
    raise ValueError("a trained parameter is in no flat group of DeepSpeed's optimizer")
