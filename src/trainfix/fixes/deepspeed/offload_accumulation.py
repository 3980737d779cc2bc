"""ZeRO-2 with CPU offload: every micro-batch of the window reaches the optimizer. Repairs TF-0001 and TF-0003.

TF-0001: deepspeed#6550 (0.15.2) made `async_accumulate_grad_in_cpu_via_gpu` either add the host buffer to the gradient
or copy the gradient into the buffer, so the sums of the middle micro-batches were thrown away.
TF-0003: `copy_grads_in_partition` keeps nothing between micro-batches when the engine's accumulation steps are 1, as
when the caller drives `set_gradient_accumulation_boundary`; present since 0.14 at least.
Both were fixed by #7967 and #7981 (0.19.0).

What we do instead: each micro-batch's slice of this rank's partition goes straight into DeepSpeed's own float32 master
gradient on the host: the first touch in a window stores, later ones add, and what the window does not touch is zeroed
in its last micro-batch. A window in which DeepSpeed's own code loses nothing (a lone micro-batch, or two) is left to
that code, bit for bit.

Delete this file when no supported framework pins a DeepSpeed older than 0.19.0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."


class Window:
    """What happened to one optimizer since its last step.

    ours: we accumulate; else DeepSpeed's own code does.
    foreign: began before trainfix saw it, so DeepSpeed finishes it.
    left: parameters that DeepSpeed's code took -> whether their sum stands in the master gradient (else in its buffer).
    touched: parameters whose master gradient holds this window's sum.
    cleared: the master gradients of all others are zero.
    settled: norms and overflow flag are those of the sums.
    queue: parameters of the bucket that is being reduced.
    """

    __slots__ = ("cleared", "foreign", "left", "ours", "queue", "reducing", "settled", "touched")

    def __init__(self, *, foreign: bool = False) -> None:
        self.foreign = foreign
        self.ours = False
        self.reducing = False
        self.settled = True
        self.cleared = False
        self.left: dict[int, bool] = {}
        self.touched: set[int] = set()
        self.queue: list[Any] = []

    @property
    def begun(self) -> bool:
        return bool(self.foreign or self.ours or self.left)


_windows: WeakKeyDictionary[Any, Window] = WeakKeyDictionary()


def _repairs(optimizer: Any) -> bool:
    """DeepSpeed's own ZeRO-2 optimizer with its state on the host. Subclasses (ZenFlow) have paths of their own."""
    own = type(optimizer).__qualname__ == "DeepSpeedZeroOptimizer"
    return own and optimizer.cpu_offload and optimizer.partition_gradients


def _in_window() -> Iterator[Any]:
    return (optimizer for optimizer, window in list(_windows.items()) if window.begun)


def _window(optimizer: Any) -> Window:
    """The optimizer's window. Of an optimizer that trainfix meets in mid-window, that window is DeepSpeed's."""
    window = _windows.get(optimizer)
    if window is None:
        window = _windows[optimizer] = Window(foreign=optimizer.micro_step_id > _first_micro_step(optimizer))
    return window


def _first_micro_step(optimizer: Any) -> int:
    """`micro_step_id` in a window's first micro-batch: 0, but up to 0.15.1 it is 1 before the first step."""
    counts_from_zero = hasattr(sys.modules[type(optimizer).__module__], "INITIAL_MICRO_STEP_ID")
    return 0 if counts_from_zero or optimizer._global_grad_norm != 0 else 1


def _forget_idle_windows() -> None:
    """After a revert DeepSpeed's code may be in mid-window where we remember none: such optimizers are strangers."""
    for optimizer, window in list(_windows.items()):
        if not window.begun:
            del _windows[optimizer]


def _at_boundary(optimizer: Any) -> bool:
    boundary = optimizer.is_gradient_accumulation_boundary
    return bool(boundary() if callable(boundary) else boundary)  # a method from 0.19.5 on


def _slice(optimizer: Any, parameter_id: int) -> tuple[Any, int, int]:
    """The parameter's slice of the master gradient, and where its own gradient's part begins and how long it is."""
    group, source, destination, count = optimizer.grad_position[parameter_id]
    master = optimizer.single_partition_of_fp32_groups[group].grad
    return master.view(-1).narrow(0, int(destination), int(count)), int(source), int(count)


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements, for a release that has these advisories' errors. Called once DeepSpeed is imported."""
    from deepspeed.accelerator import get_accelerator

    from trainfix import gradcopy

    _forget_idle_windows()
    middle_is_lost = "TF-0001" in advisories
    lone_is_lost = "TF-0003" in advisories
    copy_grads_in_partition = originals[_OPTIMIZER + "copy_grads_in_partition"]
    reduce_ipg_grads = originals[_OPTIMIZER + "reduce_ipg_grads"]

    def loses(optimizer: Any, window: Window, parameter_id: int | None) -> bool:
        """Whether DeepSpeed's own code, given this gradient now, or none, would lose it or an earlier one."""
        steps = optimizer.gradient_accumulation_steps
        if steps == 1:  # it does nothing before the boundary; there it overwrites, as a loop that skips a step may want
            return lone_is_lost and not _at_boundary(optimizer)
        if not middle_is_lost:
            return False
        if steps > 2 or (parameter_id is not None and window.left.get(parameter_id)):
            return True
        return optimizer.micro_step_id > 0 and not _at_boundary(optimizer)

    def take_over(optimizer: Any, window: Window) -> None:
        """From here on we accumulate. What DeepSpeed's code still holds in its buffers moves to the master gradient."""
        if window.left:
            get_accelerator().synchronize()  # its copies to the host are asynchronous
        for parameter_id, in_master in window.left.items():
            if in_master:
                continue
            destination, source, count = _slice(optimizer, parameter_id)
            held = optimizer.accumulated_grads_in_cpu[parameter_id].view(-1)
            if held.data_ptr() != destination.data_ptr():  # the same memory with low-precision master weights
                gradcopy.accumulate([gradcopy.Segment(destination, held.narrow(0, source, count), True)])
        window.ours = True
        window.settled = False
        window.touched.update(window.left)

    @wraps(copy_grads_in_partition)
    def queue(self: Any, param: Any, *rest: Any, **named: Any) -> Any:
        if not _repairs(self):
            return copy_grads_in_partition(self, param, *rest, **named)
        window = _window(self)
        parameter_id = self.get_param_id(param)
        if not window.ours and not window.foreign and loses(self, window, parameter_id):
            take_over(self, window)
        if not window.ours:
            result = copy_grads_in_partition(self, param, *rest, **named)
            window.left[parameter_id] = _at_boundary(self)
            return result
        window.queue.append(param)
        if not window.reducing:
            flush(self, window)

    def flush(optimizer: Any, window: Window) -> None:
        """Send the bucket to the host in one call, on the stream that DeepSpeed copies on, before it is refilled."""
        segments = []
        for param in window.queue:
            parameter_id = optimizer.get_param_id(param)
            destination, source, count = _slice(optimizer, parameter_id)
            gradient = optimizer.get_param_gradient_attribute(param).detach().reshape(-1).narrow(0, source, count)
            segments.append(gradcopy.Segment(destination, gradient, parameter_id not in window.touched))
            window.touched.add(parameter_id)
        accelerator = get_accelerator()
        stream = optimizer.reduction_stream if optimizer.overlap_comm else accelerator.current_stream()
        with accelerator.stream(stream):
            gradcopy.accumulate(segments)
        for param in window.queue:
            optimizer.clear_grad_attribute(param)
        window.queue.clear()
        window.settled = False

    @wraps(reduce_ipg_grads)
    def reduce_and_flush(self: Any, *args: Any, **named: Any) -> Any:
        if not _repairs(self):
            return reduce_ipg_grads(self, *args, **named)
        window = _window(self)
        if not window.ours and not window.foreign and loses(self, window, None):
            take_over(self, window)  # also where this rank has no gradient in the whole window
        window.reducing = True
        try:
            result = reduce_ipg_grads(self, *args, **named)
        finally:
            window.reducing = False
        if window.queue:
            flush(self, window)
        if window.ours and _at_boundary(self):
            clear(self, window)
        return result

    def clear(optimizer: Any, window: Window) -> None:
        """Once per window, in its last micro-batch: what it has not touched until then is zero, whoever reads it."""
        if window.cleared:
            return
        for group in optimizer.params_in_partition:
            for parameter_id in map(optimizer.get_param_id, group):
                if parameter_id not in window.touched:
                    _slice(optimizer, parameter_id)[0].zero_()
        window.cleared = True

    def settle(optimizer: Any) -> None:
        """Before the step reads anything: norms and the overflow flag of the sums."""
        window = _windows.get(optimizer)
        if window is None or not window.ours or window.settled:
            return
        clear(optimizer, window)
        for parameter_id in window.touched:
            norm = gradcopy.norm(_slice(optimizer, parameter_id)[0])
            optimizer.norm_for_param_grads[parameter_id] = norm
            optimizer.local_overflow = optimizer.local_overflow or not norm.isfinite().item()
        window.settled = True

    def before(original: Function) -> Function:
        @wraps(original)
        def settled(self: Any, *args: Any, **named: Any) -> Any:
            settle(self)
            return original(self, *args, **named)

        return settled

    def after(original: Function) -> Function:
        @wraps(original)
        def renewed(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            if _repairs(self):
                _windows[self] = Window()
            window_ended(self)
            return result

        return renewed

    wrappers: dict[str, Callable[[Function], Function]] = {
        "copy_grads_in_partition": lambda original: queue,
        "reduce_ipg_grads": lambda original: reduce_and_flush,
        # step() itself is not wrapped: a learning rate scheduler may have captured it. These it looks up each time.
        "check_overflow": before,
        "scaled_global_norm": before,
        "reset_cpu_buffers": after,
        # an optimizer is known from its birth; loading a checkpoint ends its window
        "initialize_optimizer_states": after,
        "load_state_dict": after,
    }
    return {_OPTIMIZER + name: wrapper(originals[_OPTIMIZER + name]) for name, wrapper in wrappers.items()}


def _middle_reached(optimizer: Any) -> str | None:
    steps = optimizer.gradient_accumulation_steps
    if not optimizer.cpu_offload:
        return None
    if getattr(optimizer, "zenflow", False):  # its update interval is the accumulation steps; 0 is "auto"
        return f"ZenFlow with an update interval of {steps or 'auto'}" if steps == 0 or steps > 2 else None
    if optimizer.partition_gradients and steps > 2:
        return f"ZeRO stage 2, offload_optimizer, gradient_accumulation_steps = {steps}"
    return None


def _lone_reached(engine: Any, is_boundary: bool, *rest: Any) -> str | None:
    optimizer = engine.optimizer
    if is_boundary or engine.gradient_accumulation_steps() != 1 or not getattr(optimizer, "cpu_offload", False):
        return None
    if not getattr(optimizer, "partition_gradients", False):
        return None
    return "set_gradient_accumulation_boundary(False) with gradient_accumulation_steps = 1, ZeRO stage 2, offload"


def _target(name: str, *shapes: str, may_be_replaced: bool = False) -> Target:
    return Target(_OPTIMIZER + name, frozenset(shapes), may_be_replaced)


# Shapes of the releases 0.14.0 to 0.18.9; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.offload_accumulation",
    package="deepspeed",
    advisories=("TF-0001", "TF-0003"),
    requires={"deepspeed": ">=0.14.0"},
    targets=(
        _target("copy_grads_in_partition", "520b1030c47e", "0e05a07a6440"),  # 0.14.0, 0.17.1
        _target(
            "reduce_ipg_grads",
            *("556e7cd4eca5", "1a8cbd04a064", "74aa3eceed6b", "af45645caf73"),  # 0.14.0, 0.14.1, 0.16.3, 0.17.2
            *("079c882a53d3", "d12b08ac8982", "743eb9f7638c"),  # 0.17.5, 0.18.5, 0.18.8
        ),
        _target("check_overflow", "95885eb5de0c", may_be_replaced=True),  # 0.14.0
        _target("scaled_global_norm", "4137349a8230", "47b8cd8bc427", "ce60e7970492"),  # 0.14.0, 0.16.3, 0.17.1
        _target("reset_cpu_buffers", "6cda85f0819f"),  # 0.14.0
        _target("initialize_optimizer_states", "7d07fdaa77dd"),  # 0.14.0
        _target("load_state_dict", "c8408baa116a", "fb311350a1b6", may_be_replaced=True),  # 0.14.0, 0.14.5
    ),
    relies_on=(
        _target("get_grad_position", "7e61f832758e"),  # 0.14.0
        _target("get_param_gradient_attribute", "e33dedf92716"),  # 0.14.0
        _target("clear_grad_attribute", "695ee6b33894"),  # 0.14.0
        _target("complete_grad_norm_calculation_for_cpu_offload", "259e2fe97328", "2d91318dfcc5"),  # 0.14.0, 0.17.1
        _target("has_overflow", "406c202e7ece", "8bf201e91769", "e8f331aa0033"),  # 0.14.0, 0.17.1, 0.18.0
        _target("unscale_and_clip_grads", "e2219515c885", "85742446066d"),  # 0.14.0, 0.14.3
        _target(
            "step",
            *("4f94c4792be6", "0ec95876ff86", "543219663f74", "40d65be63c14"),  # 0.14.0, 0.14.1, 0.15.2, 0.17.0
            *("7707a1af5aea", "7e95e0714a2b", "c3af1c7e004b"),  # 0.17.1, 0.17.5, 0.17.6
        ),
    ),
    guards=(
        Guard(_OPTIMIZER + "__init__", {"TF-0001": _middle_reached}),
        Guard(
            "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary", {"TF-0003": _lone_reached}
        ),
    ),
    build=build,
    repairs=_repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    in_window=_in_window,
    limits="the repair covers DeepSpeedZeroOptimizer itself; ZenFlow's subclass, which has the error too, is refused, "
    "and any other subclass is left alone",
    leaves_alone={
        "zero_optimization.zenflow": "ZenFlow's optimizer inherits the error and is not repaired: with trainfix, "
        "training stops with UnfixedBugError when it is built"
    },
)
