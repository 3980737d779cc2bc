"""Whether a run reaches one of these errors: asked only where the repair is not in place."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from trainfix.fixes.deepspeed.offload_accumulation import state

_used: WeakKeyDictionary[Any, tuple[int, set[int]]] = WeakKeyDictionary()  # micro-batch, parameters used up to there


def middle_is_lost(optimizer: Any) -> str | None:
    """TF-0001, when the optimizer is built."""
    steps = optimizer.gradient_accumulation_steps
    if not optimizer.cpu_offload:
        return None
    if getattr(optimizer, "zenflow", False):  # its update interval is the accumulation steps; 0 is "auto"
        return f"ZenFlow with an update interval of {steps or 'auto'}" if steps == 0 or steps > 2 else None
    if optimizer.partition_gradients and steps > 2:
        return f"ZeRO stage 2, offload_optimizer, gradient_accumulation_steps = {steps}"
    return None


def sum_is_narrow(optimizer: Any) -> str | None:
    """TF-0009, when the optimizer is built."""
    steps = optimizer.gradient_accumulation_steps
    if not optimizer.cpu_offload or steps < 2 or not state.low_precision_sum(optimizer):
        return None
    return f"ZeRO stage 2, offload_optimizer, {optimizer.dtype}, gradient_accumulation_steps = {steps}"


def lone_is_lost(engine: Any, is_boundary: bool, *rest: Any) -> str | None:
    """TF-0003, when the caller says that more micro-batches follow."""
    optimizer = engine.optimizer
    if is_boundary or engine.gradient_accumulation_steps() != 1 or not getattr(optimizer, "cpu_offload", False):
        return None
    if not getattr(optimizer, "partition_gradients", False):
        return None
    return "set_gradient_accumulation_boundary(False) with gradient_accumulation_steps = 1, ZeRO stage 2, offload"


def missing_at_the_boundary(optimizer: Any, *rest: Any) -> str | None:
    """TF-0004, before the step consumes the gradient: a parameter had none in the last micro-batch."""
    if not optimizer.cpu_offload:
        return None
    for _, parameter, parameter_id in state.owned(optimizer):
        if parameter.requires_grad and parameter_id not in optimizer.norm_for_param_grads:
            return f"a parameter of shape {tuple(parameter.shape)} had no gradient in the window's last micro-batch"
    return None


def first_used_late(optimizer: Any, parameter: Any, *rest: Any) -> str | None:
    """TF-0004, before a gradient is added to a buffer that may hold an earlier window's sum."""
    now, parameter_id = optimizer.micro_step_id, optimizer.get_param_id(parameter)
    then, used = _used.get(optimizer, (now, set()))
    if now < then:
        used = set()
    fresh = parameter_id not in used
    used.add(parameter_id)
    _used[optimizer] = now, used
    if fresh and now > 0 and parameter_id in optimizer.accumulated_grads_in_cpu:
        return f"a parameter of shape {tuple(parameter.shape)} had none in the window's first micro-batch"
    return None


def second_backward(optimizer: Any, *rest: Any) -> str | None:
    """TF-0013, before another `backward` follows one that was a boundary, without a step between them."""
    if not getattr(optimizer, "cpu_offload", False) or optimizer.gradient_accumulation_steps != 1:
        return None
    if optimizer.ready_for_gradients or optimizer.micro_step_id < 0 or not optimizer.norm_for_param_grads:
        return None
    return "a second backward() before step(), gradient_accumulation_steps = 1, no gradient accumulation boundary set"
