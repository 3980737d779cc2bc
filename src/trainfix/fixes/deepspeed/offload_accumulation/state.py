"""DeepSpeedZeroOptimizer's own state, under names that say what it is; the same over all releases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def repairs(optimizer: Any) -> bool:
    """DeepSpeed's own ZeRO-1 or ZeRO-2 optimizer with its state on the host. Subclasses (ZenFlow) go their own ways."""
    return type(optimizer).__qualname__ == "DeepSpeedZeroOptimizer" and bool(optimizer.cpu_offload)


def at_boundary(optimizer: Any) -> bool:
    """Whether the current `backward` is the window's last."""
    boundary = optimizer.is_gradient_accumulation_boundary
    return bool(boundary() if callable(boundary) else boundary)  # a method from 0.19.5 on


def owned(optimizer: Any) -> Iterator[tuple[int, Any, int]]:
    """(group, parameter, its id) of what lies in this rank's partition, wholly or partly."""
    for group, parameters in enumerate(optimizer.params_in_partition):
        for parameter in parameters:
            yield group, parameter, optimizer.get_param_id(parameter)


def master_slice(optimizer: Any, parameter_id: int) -> tuple[Any, int, int]:
    """The parameter's slice of the master gradient, and where its own gradient's part begins and how long it is."""
    group, source, destination, count = optimizer.grad_position[parameter_id]
    master = optimizer.single_partition_of_fp32_groups[group].grad
    return master.view(-1).narrow(0, int(destination), int(count)), int(source), int(count)


def sums_on_device(optimizer: Any, group: int) -> bool:
    """0.19.8 with data_types.grad_accum_dtype = fp32: DeepSpeed sums the partition on the device, in float32."""
    compact = getattr(optimizer, "_use_compact_grad_partition_buffer", None)
    return compact is not None and bool(compact(group))


def low_precision_sum(optimizer: Any) -> bool:
    """Whether DeepSpeed's own code adds this run's micro-batches up in 16 bits, though the masters have 32."""
    narrow = optimizer.dtype.itemsize < 4 and optimizer.single_partition_of_fp32_groups[0].dtype.itemsize == 4
    return narrow and optimizer.partition_gradients and not sums_on_device(optimizer, 0)
