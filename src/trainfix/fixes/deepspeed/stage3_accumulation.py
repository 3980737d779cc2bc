"""ZeRO-3: a window's gradient holds all of its micro-batches and nothing else, whichever parameters they use.
Repairs TF-0005.

`partition_grads` stores a gradient in the parameter's buffer in the window's first micro-batch and adds it in later
ones, for all parameters alike, and nothing empties the buffers between windows. A parameter that the first micro-batch
does not use is added to its sum of an earlier window; one that no micro-batch uses keeps that sum and is stepped with
it again. With offload_optimizer only gradients of the last micro-batch go on to the master gradient, so a parameter
that it does not use loses the window. Present since 0.14 at least; no release repairs it.

What we do instead: a buffer is emptied before its parameter's first gradient of a window is added to it. In the last
micro-batch the buffers that DeepSpeed has not handed on are, with their norms, and what the window did not touch is
zero. A run in which every micro-batch uses every parameter is left as it is, bit for bit.

Delete this file when the oldest supported DeepSpeed keeps account of what a window has touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_OPTIMIZER = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3."


class Window:
    """What happened to one optimizer since its last step.

    touched: parameters whose buffer holds this window's sum; the others hold zero, or the sum of an earlier one.
    settled: everything that the step will read is this window's.
    foreign: began before trainfix saw it, so DeepSpeed finishes it.
    """

    __slots__ = ("foreign", "settled", "touched")

    def __init__(self, *, foreign: bool = False) -> None:
        self.foreign = foreign
        self.settled = False
        self.touched: set[int] = set()


_windows: WeakKeyDictionary[Any, Window] = WeakKeyDictionary()


def _repairs(optimizer: Any) -> bool:
    """DeepSpeed's own ZeRO-3 optimizer, state in memory. ZenFlow and NVMe hand gradients on by paths of their own."""
    own = type(optimizer).__qualname__ == "DeepSpeedZeroOptimizer_Stage3"
    return own and not optimizer.swap_optimizer and not getattr(optimizer, "zenflow", False)


def _in_window() -> Iterator[Any]:
    return (optimizer for optimizer, window in list(_windows.items()) if window.touched)


def _window(optimizer: Any) -> Window:
    """The optimizer's window. Of an optimizer that trainfix meets in mid-window, that window is DeepSpeed's."""
    window = _windows.get(optimizer)
    if window is None:
        window = _windows[optimizer] = Window(foreign=optimizer.micro_step_id > 0)
    return window


def _buffers(optimizer: Any) -> Mapping[int, Any]:
    """Parameter -> this rank's part of the gradient that is being summed."""
    buffers: Mapping[int, Any] = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    return buffers


def _at_boundary(optimizer: Any) -> bool:
    boundary = optimizer.is_gradient_accumulation_boundary
    return bool(boundary() if callable(boundary) else boundary)  # a method from 0.19.5 on


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once DeepSpeed is imported."""
    from deepspeed.accelerator import get_accelerator

    for optimizer, window in list(_windows.items()):
        if not window.touched:  # DeepSpeed's code may since have begun a window of which we know nothing
            del _windows[optimizer]

    def touch(optimizer: Any, parameter_id: int) -> None:
        """The parameter has a gradient. Where DeepSpeed would add it to the sum of an earlier window, empty that first:
        the stream that adds waits for the one on which gradients arrive."""
        window = _window(optimizer)
        if window.foreign:
            return
        if optimizer.micro_step_id > 0 and parameter_id not in window.touched:
            _buffers(optimizer)[parameter_id].zero_()
        if optimizer.offload_optimizer and not _at_boundary(optimizer):
            optimizer.norm_for_param_grads.pop(parameter_id, None)  # what was handed on is no longer the sum
        window.touched.add(parameter_id)
        window.settled = False

    def settle(optimizer: Any) -> None:
        """Hand on what the last micro-batch did not touch, and empty what the window did not.

        A window in which this code saw no gradient at all is not ours: DeepCompile fills the buffers by itself.
        """
        window = _windows.get(optimizer)
        if window is None or window.settled or not window.touched:
            return
        for parameter_id in map(optimizer.get_param_id, chain.from_iterable(optimizer.fp16_groups)):
            used, buffer = parameter_id in window.touched, _buffers(optimizer)[parameter_id]
            if not used:
                buffer.zero_()
            if not optimizer.offload_optimizer or (used and parameter_id in optimizer.norm_for_param_grads):
                continue
            group, start, count = optimizer.grad_position[parameter_id]
            optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, start, count).copy_(buffer)
            if not used:
                optimizer.norm_for_param_grads.pop(parameter_id, None)
            else:
                held = buffer.to(get_accelerator().current_device_name())  # where DeepSpeed takes the other norms
                optimizer.norm_for_param_grads[parameter_id] = optimizer._constant_buffered_norm2(held)
        window.settled = True

    def arrival(original: Function) -> Function:
        @wraps(original)
        def touched(self: Any, param: Any, *args: Any, **named: Any) -> Any:
            if _repairs(self):
                touch(self, self.get_param_id(param))
            return original(self, param, *args, **named)

        return touched

    def epilogue(original: Function) -> Function:
        @wraps(original)
        def settled(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            if _at_boundary(self):
                settle(self)
            return result

        return settled

    def pre_step(original: Function) -> Function:
        renewed = ending(original)

        @wraps(original)
        def settled(self: Any, *args: Any, **named: Any) -> Any:
            settle(self)  # where no backward was told that it is the last: managed_gradient_accumulation = false
            return renewed(self, *args, **named)

        return settled

    def ending(original: Function) -> Function:
        @wraps(original)
        def renewed(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            if _repairs(self):
                _windows[self] = Window()
            window_ended(self)
            return result

        return renewed

    wrappers = {
        "reduce_independent_p_g_buckets_and_remove_grads": arrival,
        "overlapping_partition_gradients_reduce_epilogue": epilogue,
        "_pre_step": pre_step,
        "zero_grad": ending,
        "load_state_dict": ending,
    }
    return {_OPTIMIZER + name: wrapper(originals[_OPTIMIZER + name]) for name, wrapper in wrappers.items()}


def _late(optimizer: Any, param: Any) -> str | None:
    """Whether DeepSpeed is about to add a gradient to the sum of an earlier window."""
    window, parameter_id = _window(optimizer), optimizer.get_param_id(param)
    if window.foreign or parameter_id in window.touched:
        return None
    window.touched.add(parameter_id)
    if optimizer.micro_step_id > 0 and _buffers(optimizer)[parameter_id].any():
        return "ZeRO stage 3, a parameter that the window's first micro-batch did not use"
    return None


def _left(optimizer: Any, *rest: Any) -> str | None:
    """Whether the step is about to miss a sum of this window, or to take one of an earlier window."""
    window, _windows[optimizer] = _window(optimizer), Window()
    if window.foreign or not window.touched:
        return None
    for parameter_id, buffer in _buffers(optimizer).items():
        used = parameter_id in window.touched
        handed_on = not optimizer.offload_optimizer or parameter_id in optimizer.norm_for_param_grads
        if not (used and handed_on) and buffer.any():
            micro_batch = "last micro-batch, with offload_optimizer," if used else "micro-batches"
            return f"ZeRO stage 3, a parameter that the window's {micro_batch} did not use"
    return None


def _target(name: str, *shapes: str, may_be_replaced: bool = False) -> Target:
    return Target(_OPTIMIZER + name, frozenset(shapes), may_be_replaced)


# Shapes of the releases 0.14.0 to 0.19.8; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.stage3_accumulation",
    package="deepspeed",
    advisories=("TF-0005",),
    requires={"deepspeed": ">=0.14.0"},
    targets=(
        _target(
            "reduce_independent_p_g_buckets_and_remove_grads",
            *("48915342d607", "1c4e4a3d58e5", "8e82a844b01a"),  # 0.14.0, 0.17.0, 0.17.2
            *("7d8fe2103841", "65e5793748bd"),  # 0.19.3, 0.19.8
        ),
        _target("overlapping_partition_gradients_reduce_epilogue", "ee268c080ec9"),  # 0.14.0
        _target(
            "_pre_step",
            *("e3fffd1fdda3", "0c96009cb114", "cf9e45906655"),  # 0.14.0, 0.15.4, 0.17.5
            *("f6626b9138dd", "bf7c23acdf65"),  # 0.18.5, 0.19.5
        ),
        _target("zero_grad", "6ed9a3fff03a", "75870467fcff"),  # 0.14.0, 0.18.5
        _target(
            "load_state_dict",
            *("cbb62c4b5d06", "a18bee6c7e87", "f5a92cfcdc16", "bf77095ce7b6"),  # 0.14.0, 0.14.5, 0.18.0, 0.19.3
            may_be_replaced=True,
        ),
    ),
    relies_on=(
        _target(
            "partition_grads",
            *("f0dbb32acfaa", "573eb7a52d77", "1353694b43a0", "456dff30eba5"),  # 0.14.0, 0.15.4, 0.16.3, 0.16.6
            *("7e9feeec9b8c", "7522932e1599", "ae955b438f59", "64e58770ddef"),  # 0.17.5, 0.18.3, 0.19.3, 0.19.5
        ),
        _target(
            "independent_gradient_partition_epilogue",
            *("98978301f594", "2c21b1152779", "ab7e6fcc6f31", "523654855528"),  # 0.14.0, 0.17.2, 0.17.5, 0.18.5
        ),
        _target(
            "__reduce_and_partition_ipg_grads",
            *("6f05e4d08136", "a75bbe376ce1", "35419f116871"),  # 0.14.0, 0.17.2, 0.17.3
            *("b8d0c96d8fc2", "7f476a1d12de", "f14cbc37321a"),  # 0.17.6, 0.18.1, 0.19.3
        ),
        _target(
            "_setup_for_real_optimizer",
            *("a850e2c69fc8", "2043b6560445", "48cfcae10b5b"),  # 0.14.0, 0.15.4, 0.17.2
            *("839e4e6ca229", "1c9b541d0b43", "f2dbe39dfca0"),  # 0.17.5, 0.18.8, 0.19.5
        ),
        _target("set_grad_positions", "12a2d183fd2f", "8b6a4040db52"),  # 0.14.0, 0.17.5
        _target("get_param_id", "fb51778fbc06"),  # 0.14.0
        _target("_constant_buffered_norm2", "82cfad3170cb", "51a1977f8516"),  # 0.14.0, 0.19.6
        _target(
            "complete_grad_norm_calculation_for_cpu_offload",
            *("c2451f0cba29", "e38293c11365", "df3e749e4d28"),  # 0.14.0, 0.14.3, 0.14.5
            *("d2c847f1cf8c", "670e698f6bfe", "d9064ed94d40"),  # 0.16.6, 0.19.3, 0.19.8
        ),
        _target("has_overflow", "6076e6f6b733", "af7acc5a91bb"),  # 0.14.0, 0.15.0
        _target("reset_cpu_buffers", "0c606aa23d96"),  # 0.14.0
        _target(
            "step",
            *("2d40eb83b9c8", "d12e34c60083", "1644aaf493f8"),  # 0.14.0, 0.14.1, 0.14.5
            *("51e9b2c8c87a", "cd92461cb002"),  # 0.16.3, 0.19.8
        ),
    ),
    guards=(
        Guard(_OPTIMIZER + "__init__", {"TF-0005": lambda optimizer: None}),  # ranks agree there; gradients show it
        Guard(_OPTIMIZER + "reduce_independent_p_g_buckets_and_remove_grads", {"TF-0005": _late}),
        Guard(_OPTIMIZER + "_pre_step", {"TF-0005": _left}),
    ),
    build=build,
    repairs=_repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    in_window=_in_window,
    limits="the repair covers DeepSpeedZeroOptimizer_Stage3 itself with its state in memory; NVMe offload, ZenFlow, "
    "SuperOffload and MiCS, which have the error by their source text, are left alone",
    leaves_alone={
        "zero_optimization.offload_optimizer.nvme_path": "gradients that are swapped to NVMe are not repaired",
        "zero_optimization.offload_optimizer.super_offload": "SuperOffload's optimizer is not repaired",
        "zero_optimization.zenflow": "ZenFlow's optimizer is not repaired",
        "zero_optimization.mics_shard_size": "MiCS's optimizer is not repaired",
    },
)
