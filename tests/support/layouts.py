"""Where each of DeepSpeed's optimizers keeps the gradient that torch's optimizer consumes: one class per optimizer.

Used in the child of tests.support.experiment only. A layout knows three things: what torch's optimizer is about to
consume (`see`, called by its step pre-hook), how that maps to the model's parameters (`consumed`), and where
micro-batch gradients arrive on their owning rank after the reduction (`watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Arrive = Callable[[int, int, "torch.Tensor"], None]
"""(number of the trained parameter, first element in it, the piece [n] of its reduced gradient that this rank owns)"""


def of(zero: Any, trained: Sequence[torch.Tensor]) -> Partitioned:
    """The layout of this optimizer, as `deepspeed.initialize` returned it."""
    return Partitioned(zero, trained)


class Partitioned:
    """ZeRO stages 1 and 2: every group's parameters lie in one flat buffer, of which each rank owns a part."""

    def __init__(self, zero: Any, trained: Sequence[torch.Tensor]) -> None:
        self.zero, self.trained = zero, trained
        self.seen: dict[int, torch.Tensor] = {}
        self.places = [self._place(parameter) for parameter in trained]

    def _place(self, parameter: torch.Tensor) -> tuple[int, int]:
        """The parameter's group, and where it starts in the group's flat buffer, in elements."""
        address = parameter.data_ptr()
        for group, flat in enumerate(self.zero.bit16_groups_flat):
            offset = (address - flat.data_ptr()) // flat.element_size()
            if 0 <= offset < flat.numel():
                return group, offset
        raise RuntimeError("a trained parameter is in no flat group of the ZeRO optimizer")

    def see(self, optimizer: Any) -> None:
        """ZeRO steps one group at a time, whose only parameter is this rank's flat partition."""
        for group in optimizer.param_groups:
            (partition,) = group["params"]
            index = next(i for i, own in enumerate(self.zero.single_partition_of_fp32_groups) if own is partition)
            self.seen[index] = partition.grad.detach().clone()

    def consumed(self) -> torch.Tensor:
        """All ranks' partitions as the optimizer saw them, in the model's order [elements], float32."""
        import torch

        flat: list[torch.Tensor] = []
        for index in range(len(self.zero.bit16_groups_flat)):
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
            for group, which, _ in entries:
                parameter = zero.bit16_groups[group][which] if isinstance(which, int) else which
                self._arrived(parameter, zero.get_gradient_for_reduction(parameter), arrive)
            return answer

        zero.average_tensor = average_tensor

    def _arrived(self, parameter: torch.Tensor, gradient: torch.Tensor, arrive: Arrive) -> None:
        """Hand on what this rank owns of a reduced gradient."""
        import torch

        index = next(i for i, own in enumerate(self.trained) if own is parameter)
        group, start = self.places[index]
        size = self.zero.single_partition_of_fp32_groups[group].numel()
        first = torch.distributed.get_rank() * size
        low, high = max(first - start, 0), min(first + size - start, parameter.numel())
        if low < high:
            arrive(index, low, gradient.detach().reshape(-1)[low:high])
