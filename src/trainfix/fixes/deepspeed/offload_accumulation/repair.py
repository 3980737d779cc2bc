"""The replacements: what DeepSpeedZeroOptimizer's methods do in a window that DeepSpeed's own code would spoil."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from trainfix.engine.contract import Function, window_ended
from trainfix.fixes.deepspeed.offload_accumulation import carriers, reached
from trainfix.fixes.deepspeed.offload_accumulation import window as windows
from trainfix.fixes.deepspeed.offload_accumulation.state import (
    at_boundary,
    low_precision_sum,
    master_slice,
    owned,
    repairs,
    sums_on_device,
)
from trainfix.fixes.deepspeed.offload_accumulation.window import Window

OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements, for a release that has these advisories' errors. Called once DeepSpeed is imported."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from trainfix.gradcopy import Segment, squares_on_host

    windows.forget_idle()
    copy_grads_in_partition = originals[OPTIMIZER + "copy_grads_in_partition"]
    reduce_ipg_grads = originals[OPTIMIZER + "reduce_ipg_grads"]

    def loses(optimizer: Any, window: Window, parameter_id: int | None) -> bool:
        """Whether DeepSpeed's own code, given this gradient now, or none, would lose it or an earlier one."""
        steps, more_follow = optimizer.gradient_accumulation_steps, not at_boundary(optimizer)
        stored = parameter_id is not None and window.left.get(parameter_id, False)
        if steps == 1 and "TF-0013" in advisories and stored and window.closed_at is not None:
            # It adds its buffer, which does not hold the first `backward`, to a second one.
            return optimizer.micro_step_id > window.closed_at and not sums_on_device(optimizer, 0)
        if not optimizer.partition_gradients:
            return False
        if "TF-0009" in advisories and (steps > 1 or more_follow) and low_precision_sum(optimizer):
            return True
        if steps == 1:  # it does nothing before the boundary; there it overwrites, as a loop that skips a step may want
            return "TF-0003" in advisories and more_follow
        if "TF-0001" not in advisories:
            return False
        return steps > 2 or stored or (optimizer.micro_step_id > 0 and more_follow)

    def take_over(optimizer: Any, window: Window) -> None:
        """From here on we accumulate. What DeepSpeed's code still holds in its buffers moves to the master gradient."""
        move(optimizer, [parameter_id for parameter_id, in_master in window.left.items() if not in_master])
        window.ours = True
        window.settled = False
        window.touched.update(window.left)

    def move(optimizer: Any, parameter_ids: list[int]) -> None:
        """Sums that DeepSpeed holds in its own buffers on the host -> the master gradient."""
        if parameter_ids:
            get_accelerator().synchronize()  # its copies to the host are asynchronous
        for parameter_id in parameter_ids:
            destination, source, count = master_slice(optimizer, parameter_id)
            held = optimizer.accumulated_grads_in_cpu[parameter_id].view(-1)
            if held.data_ptr() != destination.data_ptr():  # the same memory with low-precision master weights
                destination.copy_(held.narrow(0, source, count))

    @wraps(copy_grads_in_partition)
    def queue(self: Any, param: Any, *rest: Any, **named: Any) -> Any:
        if not repairs(self):
            return copy_grads_in_partition(self, param, *rest, **named)
        window = windows.of(self)
        parameter_id = self.get_param_id(param)
        if not window.ours and not window.foreign and loses(self, window, parameter_id):
            take_over(self, window)
        if not window.ours:
            if not window.foreign and parameter_id not in window.left:
                forget_earlier_window(self, parameter_id)
            result = copy_grads_in_partition(self, param, *rest, **named)
            window.touched.discard(parameter_id)
            window.left[parameter_id] = at_boundary(self)
            if window.left[parameter_id]:
                window.closed_at = self.micro_step_id
            return result
        window.queue.append(param)
        if not window.reducing:
            flush(self, window)

    def forget_earlier_window(optimizer: Any, parameter_id: int) -> None:
        """Before the parameter's first gradient of this window: from the second micro-batch on DeepSpeed adds it to a
        buffer that nobody has emptied since the buffer was last used."""
        if not optimizer.partition_gradients and optimizer.gradient_accumulation_steps > 1:
            return  # stage 1 sums on the device: where it has such a buffer it never writes to it
        held = optimizer.accumulated_grads_in_cpu.get(parameter_id)
        if held is not None and optimizer.micro_step_id > 0:
            held.zero_()

    def flush(optimizer: Any, window: Window) -> None:
        """Send the bucket to the host in one call, on the stream that DeepSpeed copies on, before it is refilled."""
        segments = []
        for param in window.queue:
            parameter_id = optimizer.get_param_id(param)
            destination, source, count = master_slice(optimizer, parameter_id)
            gradient = optimizer.get_param_gradient_attribute(param).detach().reshape(-1).narrow(0, source, count)
            segments.append(Segment(parameter_id, destination, gradient, parameter_id not in window.touched))
            window.touched.add(parameter_id)
        accelerator = get_accelerator()
        stream = optimizer.reduction_stream if optimizer.overlap_comm else accelerator.current_stream()
        with accelerator.stream(stream):
            carriers.of(optimizer).accumulate(segments, last=at_boundary(optimizer))
        for param in window.queue:
            optimizer.clear_grad_attribute(param)
        window.queue.clear()
        window.settled = False

    @wraps(reduce_ipg_grads)
    def reduce_and_flush(self: Any, *args: Any, **named: Any) -> Any:
        if not repairs(self):
            return reduce_ipg_grads(self, *args, **named)
        window = windows.of(self)
        if not window.ours and not window.foreign and loses(self, window, None):
            take_over(self, window)  # also where this rank has no gradient in the whole window
        window.reducing = True
        try:
            result = reduce_ipg_grads(self, *args, **named)
        finally:
            window.reducing = False
        if window.queue:
            flush(self, window)
        return result

    def finish(optimizer: Any, window: Window) -> None:
        """At the end of the window's last micro-batch, whoever reads the master gradient next: it holds what DeepSpeed
        still had in its buffers, and zero for what had no gradient in the whole window."""
        if window.ours:
            carriers.of(optimizer).wait()
        if window.foreign or window.cleared:
            return
        touched, waiting = window.touched.union(window.left), list[int]()
        for group, param, parameter_id in owned(optimizer):
            if parameter_id not in touched:
                master_slice(optimizer, parameter_id)[0].zero_()
            elif not window.ours and not window.left[parameter_id] and parameter_id not in window.touched:
                # Its norm is there already when the accumulation is not managed by the engine (0.19.5).
                if sums_on_device(optimizer, group):
                    copy_grads_in_partition(optimizer, param, group)
                    window.left[parameter_id] = True
                elif parameter_id not in optimizer.norm_for_param_grads:
                    waiting.append(parameter_id)
        move(optimizer, waiting)
        window.touched.update(waiting)
        window.settled = window.settled and not waiting
        window.cleared = window.ours

    def settle(optimizer: Any) -> None:
        """Before the step reads anything: norms and the overflow flag of the sums that we put there."""
        window = windows.known.get(optimizer)
        if window is None:
            return
        finish(optimizer, window)
        if window.settled:
            return
        slices = {parameter_id: master_slice(optimizer, parameter_id)[0] for parameter_id in window.touched}
        squares = carriers.of(optimizer).squares if window.ours else squares_on_host
        for parameter_id, square in squares(slices).items():
            optimizer.norm_for_param_grads[parameter_id] = torch.tensor(math.sqrt(square), dtype=torch.float64)
            optimizer.local_overflow = optimizer.local_overflow or not math.isfinite(square)
        window.settled = True

    def before(original: Function) -> Function:
        @wraps(original)
        def settled(self: Any, *args: Any, **named: Any) -> Any:
            settle(self)
            return original(self, *args, **named)

        return settled

    def at_the_end(original: Function) -> Function:
        @wraps(original)
        def finished(self: Any, *args: Any, **named: Any) -> Any:
            window = windows.known.get(self)
            if window is not None and at_boundary(self):
                finish(self, window)
            return original(self, *args, **named)

        return finished

    def after(original: Function) -> Function:
        @wraps(original)
        def renewed(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            if repairs(self):
                windows.known[self] = Window()
                if self in carriers.known:
                    carriers.of(self).renew()
            window_ended(self)
            return result

        return renewed

    def at_birth(original: Function) -> Function:
        known = after(original)

        @wraps(original)
        def prepared(self: Any, *args: Any, **named: Any) -> Any:
            result = known(self, *args, **named)
            if repairs(self) and "TF-0001" in advisories and reached.middle_is_lost(self) is not None:
                carriers.of(self)  # memory is pinned before anyone communicates, when it is known to be needed
            return result

        return prepared

    wrappers: dict[str, Callable[[Function], Function]] = {
        "copy_grads_in_partition": lambda original: queue,
        "reduce_ipg_grads": lambda original: reduce_and_flush,
        "_release_ipg_buffers": at_the_end,  # the last thing that happens to a micro-batch's gradients
        # step() itself is not wrapped: a learning rate scheduler may have captured it. These it looks up each time.
        "check_overflow": before,
        "scaled_global_norm": before,
        "reset_cpu_buffers": after,
        "initialize_optimizer_states": at_birth,
        "load_state_dict": after,  # ends the window
    }
    return {OPTIMIZER + name: wrapper(originals[OPTIMIZER + name]) for name, wrapper in wrappers.items()}
