"""Where each of DeepSpeed's optimizers keeps the gradient that torch's optimizer consumes: one class per optimizer.

Used in the child of tests.support.experiment only. A layout knows three things: what torch's optimizer is about to
consume (`see`, called by its step pre-hook), how that maps to the model's parameters (`consumed`), and where
micro-batch gradients arrive on their owning rank after the reduction (`watch`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Arrive = Callable[[int, int, "torch.Tensor"], None]
"""(number of the trained parameter, first element in it, the piece [n] of its reduced gradient that this rank owns)"""


def of(zero: Any, trained: Sequence[torch.Tensor]) -> Partitioned | Scattered | Unpartitioned:
    """The layout of this optimizer, as `deepspeed.initialize` returned it."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return Scattered(zero, trained)
    if hasattr(zero, "fp32_groups_gradients_flat"):
        return Bf16Partitioned(zero, trained)
    return Partitioned(zero, trained) if hasattr(zero, "bit16_groups_flat") else Unpartitioned(zero, trained)


@contextmanager
def full_weights(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it every parameter holds all of its elements. ZeRO stage 3 scatters them over the ranks otherwise.

    One at a time: of several in one call DeepSpeed waits for the last alone, which gloo may finish before the others.
    """
    with ExitStack() as gathered:
        for parameter in parameters:
            if hasattr(parameter, "ds_id"):
                gathered.enter_context(sys.modules["deepspeed"].zero.GatheredParameters([parameter]))
        yield


class Partitioned:
    """ZeRO stages 1 and 2: every group's parameters lie in one flat buffer, of which each rank owns a part."""

    buffers = "bit16_groups_flat", "single_partition_of_fp32_groups"

    def __init__(self, zero: Any, trained: Sequence[torch.Tensor]) -> None:
        self.zero, self.trained = zero, trained
        self.flat, self.own = (getattr(zero, name) for name in self.buffers)
        self.seen: dict[int, torch.Tensor] = {}
        self.places = [self._place(parameter) for parameter in trained]

    def _place(self, parameter: torch.Tensor) -> tuple[int, int]:
        """The parameter's group, and where it starts in the group's flat buffer, in elements."""
        address = parameter.data_ptr()
        for group, flat in enumerate(self.flat):
            offset = (address - flat.data_ptr()) // flat.element_size()
            if 0 <= offset < flat.numel():
                return group, offset
        raise RuntimeError("a trained parameter is in no flat group of the ZeRO optimizer")

    def see(self, optimizer: Any) -> None:
        """ZeRO steps one group at a time, whose only parameter is this rank's flat partition."""
        for group in optimizer.param_groups:
            (partition,) = group["params"]
            index = next(i for i, own in enumerate(self.own) if own is partition)
            self.seen[index] = partition.grad.detach().clone()

    def consumed(self) -> torch.Tensor:
        """All ranks' partitions as the optimizer saw them, in the model's order [elements], float32."""
        import torch

        flat: list[torch.Tensor] = []
        for index in range(len(self.flat)):
            own = self.seen[index].float().contiguous()
            parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, own)
            flat.append(torch.cat(parts))
        pairs = zip(self.trained, self.places, strict=True)
        return torch.cat([flat[group][start : start + parameter.numel()] for parameter, (group, start) in pairs])

    def watch(self, arrive: Arrive) -> None:
        """Note every gradient right after the reduction, by wrapping a method of this object (not of its class)."""
        zero = self.zero
        reduce = zero.average_tensor

        def average_tensor(tensor: torch.Tensor, *rest: Any) -> Any:
            answer = reduce(tensor, *rest)
            entries = zero.ipg_buckets[rest[0]].params if hasattr(zero, "ipg_buckets") else zero.params_in_ipg_bucket
            first = 0
            for group, which, _ in entries:
                parameter = zero.bit16_groups[group][which] if isinstance(which, int) else which
                self._arrived(parameter, tensor[first : first + parameter.numel()], arrive)
                first += parameter.numel()
            return answer

        zero.average_tensor = average_tensor

    def _arrived(self, parameter: torch.Tensor, gradient: torch.Tensor, arrive: Arrive) -> None:
        """Hand on what this rank owns of a reduced gradient."""
        import torch

        index = next(i for i, own in enumerate(self.trained) if own is parameter)
        group, start = self.places[index]
        size = self.own[group].numel()
        first = torch.distributed.get_rank() * size
        low, high = max(first - start, 0), min(first + size - start, parameter.numel())
        if low < high:
            arrive(index, low, gradient.detach().reshape(-1)[low:high])


class Scattered:
    """ZeRO stage 3: each parameter is cut into one piece per rank, the last padded; a flat buffer per sub-group."""

    def __init__(self, zero: Any, trained: Sequence[torch.Tensor]) -> None:
        self.zero, self.trained = zero, trained
        self.seen: dict[int, torch.Tensor] = {}

    def see(self, optimizer: Any) -> None:
        """ZeRO steps one sub-group at a time, whose only parameter is this rank's flat buffer of pieces."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                index = next(i for i, own in enumerate(self.zero.fp32_partitioned_groups_flat) if own is flat)
                self.seen[index] = flat.grad.detach().clone()

    def consumed(self) -> torch.Tensor:
        """All ranks' pieces as the optimizer saw them, in the model's order [elements], float32."""
        import torch

        return torch.cat([self._whole(parameter) for parameter in self.trained])

    def _whole(self, parameter: Any) -> torch.Tensor:
        import torch

        index, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
        own = self.seen[index].narrow(0, start, count).float().contiguous()
        pieces = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(pieces, own)
        return torch.cat(pieces)[: parameter.ds_numel]

    def watch(self, arrive: Arrive) -> None:
        """Note every piece right after the reduction, by wrapping a method of this object (not of its class)."""
        import torch

        name = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
        reduce = getattr(self.zero, name)

        def avg_scatter_grads(parameters: Sequence[Any], *rest: Any) -> Any:
            pieces = reduce(parameters, *rest)
            for parameter, piece in zip(parameters, pieces, strict=True):
                index = next(i for i, own in enumerate(self.trained) if own is parameter)
                start = torch.distributed.get_rank() * parameter.partition_numel()
                arrive(index, start, piece.detach().reshape(-1)[: max(parameter.ds_numel - start, 0)])
            return pieces

        setattr(self.zero, name, avg_scatter_grads)


class Bf16Partitioned(Partitioned):
    """BF16_Optimizer: partitioned as stage 1 is, but what torch's optimizer consumes has accumulated in float32."""

    buffers = "bf16_groups_flat", "fp32_groups_flat_partition"

    def watch(self, arrive: Arrive) -> None:
        """Note every gradient of autograd's: the sum over the ranks is the mean that should arrive."""
        _watch_autograd(self.trained, arrive)


class Unpartitioned:
    """Stage 0: torch's optimizer sees each parameter, or its float32 copy, whole and on every rank."""

    def __init__(self, zero: Any, trained: Sequence[torch.Tensor]) -> None:
        self.trained = trained
        self.seen: dict[int, torch.Tensor] = {}
        masters: Any = [parameter for group in zero.param_groups for parameter in group["params"]]
        models = [parameter for group in getattr(zero, "fp16_groups", [masters]) for parameter in group]
        self.master_of = {id(model): id(master) for model, master in zip(models, masters, strict=True)}

    def see(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            self.seen |= {id(parameter): parameter.grad.detach().clone() for parameter in group["params"]}

    def consumed(self) -> torch.Tensor:
        """In the model's order [elements], float32."""
        import torch

        return torch.cat([self.seen[self.master_of[id(own)]].float().reshape(-1) for own in self.trained])

    def watch(self, arrive: Arrive) -> None:
        """Note every gradient of autograd's: the sum over the ranks is the mean that should arrive."""
        _watch_autograd(self.trained, arrive)


def _watch_autograd(trained: Sequence[torch.Tensor], arrive: Arrive) -> None:
    import torch

    ranks = torch.distributed.get_world_size()
    for index, parameter in enumerate(trained):
        parameter.register_hook(lambda gradient, index=index: arrive(index, 0, gradient.double().reshape(-1) / ranks))
