"""ZeRO-1 with overlap_comm: what the last micro-batch does not use is reduced all the same. Repairs TF-0042.

Stage 1 sums a window in the parameters' own gradients and reduces them in its last micro-batch. With overlap_comm the
gradient hooks do that, as each gradient comes; a parameter that this micro-batch does not use has no hook called, and
`reduce_gradients` looks for what is left only without overlap_comm. The sum is lost with offload_optimizer, and not
averaged over the ranks without. Present since 0.14 at least; no release repairs it.

What we do instead: before `reduce_gradients` ends the window, what the hooks have not handed over is, in the order of
the parameters. The ranks first tell each other what that is, in one small all-reduce per window: a rank that did not
use such a parameter in the whole window takes part with zeros. Where nothing is left nothing else changes.

Delete this file when no supported DeepSpeed skips these parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any

from trainfix.engine.contract import Fix, Function, Guard, Target

_OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."


def _repairs(optimizer: Any) -> bool:
    """DeepSpeed's own ZeRO-1 optimizer with overlap_comm. Experts have groups of their own: those are left alone."""
    own = type(optimizer).__qualname__ == "DeepSpeedZeroOptimizer"
    return own and optimizer.overlap_comm and not optimizer.partition_gradients and not optimizer.has_moe_layers


def _parameters(optimizer: Any) -> Iterator[tuple[int, Any]]:
    return ((group, param) for group, members in enumerate(optimizer.bit16_groups) for param in members)


def _left(optimizer: Any) -> list[bool]:
    """For each parameter: whether it has a gradient that no hook has handed over."""
    buckets = getattr(optimizer, "ipg_buckets", None)  # one per dtype from 0.17.2 on
    waiting = optimizer.params_in_ipg_bucket if buckets is None else [e for b in buckets.values() for e in b.params]
    handed_over = {parameter_id for _, _, parameter_id in waiting}
    left = []
    for _, param in _parameters(optimizer):
        parameter_id = optimizer.get_param_id(param)
        done = parameter_id in handed_over or optimizer.params_already_reduced[parameter_id]
        left.append(not done and optimizer.get_param_gradient_attribute(param) is not None)
    return left


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once DeepSpeed is imported."""
    import torch
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    reduce_gradients = originals[_OPTIMIZER + "reduce_gradients"]

    def agreed(optimizer: Any, left: list[bool]) -> list[bool]:
        """What is left on any rank."""
        if comm.get_world_size(group=optimizer.dp_process_group) == 1:
            return left
        flags = torch.tensor(left, dtype=torch.uint8, device=get_accelerator().current_device_name())
        comm.all_reduce(flags, op=comm.ReduceOp.MAX, group=optimizer.dp_process_group)
        return [bool(flag) for flag in flags.tolist()]

    def with_gradient(optimizer: Any, param: Any) -> Any:
        if optimizer.get_param_gradient_attribute(param) is None:
            if optimizer.use_grad_accum_attribute:
                param.grad_accum = torch.zeros_like(param, dtype=optimizer.gradient_accumulation_dtype)
            else:
                param.grad = torch.zeros_like(param)
        return param

    @wraps(reduce_gradients)
    def reduce_all(self: Any, *args: Any, **named: Any) -> Any:
        if _repairs(self):
            for (group, param), left in zip(_parameters(self), agreed(self, _left(self)), strict=True):
                if left:
                    self.reduce_ready_partitions_and_remove_grads(with_gradient(self, param), group)
        return reduce_gradients(self, *args, **named)

    return {_OPTIMIZER + "reduce_gradients": reduce_all}


def _reached(optimizer: Any, *rest: Any, **named: Any) -> str | None:
    if optimizer.partition_gradients or not optimizer.overlap_comm or not any(_left(optimizer)):
        return None
    return "ZeRO stage 1, overlap_comm, a parameter that the window's last micro-batch did not use"


def _target(name: str, *shapes: str) -> Target:
    return Target(_OPTIMIZER + name, frozenset(shapes))


# Shapes of the releases 0.14.0 to 0.19.8; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.stage1_overlap",
    package="deepspeed",
    advisories=("TF-0042",),
    requires={"deepspeed": ">=0.14.0"},
    targets=(_target("reduce_gradients", "1dd116bd155b", "2ae01fe083f2"),),  # 0.14.0, 0.17.2
    relies_on=(
        _target(
            "reduce_ready_partitions_and_remove_grads",
            *("64a441c6e0c7", "ed479e15dd01", "576d4e1e7cdf"),  # 0.14.0, 0.17.5, 0.19.5
        ),
        _target("get_param_gradient_attribute", "e33dedf92716"),  # 0.14.0
    ),
    guards=(
        Guard(_OPTIMIZER + "__init__", {"TF-0042": lambda optimizer: None}),  # ranks agree there; gradients show it
        Guard(_OPTIMIZER + "reduce_gradients", {"TF-0042": _reached}),
    ),
    build=build,
    repairs=_repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    limits="the repair covers DeepSpeedZeroOptimizer itself without Mixture-of-Experts layers",
)
