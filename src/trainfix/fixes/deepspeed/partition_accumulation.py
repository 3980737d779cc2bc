"""ZeRO-2 without offload: every micro-batch of the window reaches the optimizer. Repairs TF-0002.

deepspeed#7509 (0.17.6, Muon) split the list of a window's gradients in two: `all_grad_tensors`, which every micro-batch
should be added to, and `averaged_gradients`, which is made of it at the boundary. The epilogue of each backward still
asks `averaged_gradients` whether the window has begun, so it always finds it new, and each micro-batch replaces the
sum of the ones before. #7665 (0.18.3) asks `all_grad_tensors`.

What we do instead: the epilogue takes a new list from `get_all_grad_tensors`. In mid-window we add the new gradients
to the list that is already there, on the device and in place, and hand that out as the new one: what 0.18.3 does, in
the same order and to the same bits.

Delete this file when no supported framework pins DeepSpeed 0.17.6 to 0.18.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any
from weakref import WeakSet

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."
_LOADS = ("_load_legacy_checkpoint", "_load_universal_checkpoint")


class Sum(list[Any]):
    """A group's gradients, summed from its window's first micro-batch on. A plain list is DeepSpeed's own."""


_optimizers: WeakSet[Any] = WeakSet()


def _repairs(optimizer: Any) -> bool:
    """Stage 2 with its state on the device. Stage 1 reduces, and builds the list, at the boundary only."""
    return bool(optimizer.partition_gradients) and not optimizer.cpu_offload


def _in_window() -> Iterator[Any]:
    for optimizer in list(_optimizers):
        if any(isinstance(held, Sum) for held in optimizer.all_grad_tensors.values()):
            yield optimizer


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once DeepSpeed is imported."""
    get_all_grad_tensors = originals[_OPTIMIZER + "get_all_grad_tensors"]

    @wraps(get_all_grad_tensors)
    def summed(self: Any, tensor_list: Any, *args: Any, **named: Any) -> Any:
        gradients = get_all_grad_tensors(self, tensor_list, *args, **named)
        if not _repairs(self):
            return gradients
        group = next(i for i, own in enumerate(self.params_in_partition) if own is tensor_list)
        held = self.all_grad_tensors.get(group)
        if held is None:  # the window's first micro-batch; DeepSpeed drops the list at the boundary, and with a step
            held = Sum(gradients)
            _optimizers.add(self)
        elif isinstance(held, Sum):
            for total, gradient in zip(held, gradients, strict=True):
                total.add_(gradient)
        else:  # the window began before trainfix saw it
            held = gradients
        if self.is_gradient_accumulation_boundary and group == len(self.params_in_partition) - 1:
            window_ended(self)
        return held

    def ending(original: Function) -> Function:
        @wraps(original)
        def loaded(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            for group, held in self.all_grad_tensors.items():
                if isinstance(held, Sum):
                    self.all_grad_tensors[group] = None
            window_ended(self)
            return result

        return loaded

    # Loading a checkpoint ends the window.
    loads = {path: ending(originals[path]) for path in map(_OPTIMIZER.__add__, _LOADS)}
    return {_OPTIMIZER + "get_all_grad_tensors": summed, **loads}


def _reached(optimizer: Any) -> str | None:
    steps = optimizer.gradient_accumulation_steps
    if not _repairs(optimizer) or steps == 1:
        return None
    return f"ZeRO stage 2 without offload_optimizer, gradient_accumulation_steps = {steps}"


def _lone_reached(engine: Any, is_boundary: bool, *rest: Any) -> str | None:
    optimizer = engine.optimizer
    if is_boundary or engine.gradient_accumulation_steps() != 1 or getattr(optimizer, "cpu_offload", True):
        return None
    if not getattr(optimizer, "partition_gradients", False):
        return None
    return "set_gradient_accumulation_boundary(False) with gradient_accumulation_steps = 1, ZeRO stage 2, no offload"


def _target(name: str, *shapes: str) -> Target:
    return Target(_OPTIMIZER + name, frozenset(shapes))


# The shapes of 0.17.6 to 0.18.2.
FIX = Fix(
    name="deepspeed.partition_accumulation",
    package="deepspeed",
    advisories=("TF-0002",),
    requires={"deepspeed": ">=0.17.6"},
    targets=(
        _target("get_all_grad_tensors", "8230615a1d7c"),
        _target("_load_legacy_checkpoint", "f0dd2c47b9f5"),
        _target("_load_universal_checkpoint", "d6ce20b9de71"),
    ),
    relies_on=(
        _target("get_flat_partition", "269238bc08a4"),
        _target("get_param_gradient_attribute", "e33dedf92716"),
        _target("step", "c3af1c7e004b"),
    ),
    guards=(
        Guard(_OPTIMIZER + "__init__", {"TF-0002": _reached}),
        Guard(
            "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary", {"TF-0002": _lone_reached}
        ),
    ),
    build=build,
    repairs=_repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    in_window=_in_window,
)
