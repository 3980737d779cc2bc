"""ZeRO-1 with an accumulation dtype of its own: what is reduced is what the optimizer gets. Repairs TF-0006.

Where `data_types.grad_accum_dtype` differs from the model's dtype, stage 1 sums a window in `param.grad_accum`, which
the optimizer's partition is taken from. `get_gradient_for_reduction` gives the bucket a copy of it in the model's
dtype, so that the copy is averaged over the ranks and then forgotten: every rank trains its partition on its own
gradient. So it is since #2847 (0.10.1); 0.19.8 returns the sum itself.

What we do instead: the same. The bucket keeps the release's own dtype, and with it what is communicated: its code
copies the sum into the bucket, lets `grad_accum` point there, and reduces it in place, as it does with `param.grad`
where there is no `grad_accum`. With one rank nothing is averaged, and the sum stays as it was, unrounded.

Up to 0.16.4 the hooks of overlap_comm ask for the gradient before the last micro-batch was added to it, and with
offload that micro-batch was lost wherever the bucket was sent before the end of the backward. It is added first.

Nothing is remembered: a window is reduced in its last micro-batch as a whole, by this function or by DeepSpeed's own.

Delete this file when no supported framework pins a DeepSpeed older than 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from trainfix.engine.contract import Fix, Function, Guard, Target

_OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer."


def _ranks(optimizer: Any) -> int:
    from deepspeed import comm

    return int(comm.get_world_size(group=optimizer.dp_process_group))


def _repairs(optimizer: Any) -> bool:
    """DeepSpeed's own stage 1 with separate sums. ZenFlow's subclass cannot run with them: it reads `param.grad`."""
    return type(optimizer).__qualname__ == "DeepSpeedZeroOptimizer" and bool(optimizer.use_grad_accum_attribute)


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement. Called once DeepSpeed is imported."""
    get_gradient_for_reduction = originals[_OPTIMIZER + "get_gradient_for_reduction"]

    def add_last(optimizer: Any, param: Any) -> None:
        gradient = param.grad.to(optimizer.gradient_accumulation_dtype)
        if param.grad_accum is None:
            param.grad_accum = gradient
        else:
            param.grad_accum.add_(gradient)
        param.grad = None

    @wraps(get_gradient_for_reduction)
    def accumulated(self: Any, param: Any) -> Any:
        if not _repairs(self):
            return get_gradient_for_reduction(self, param)
        if param.grad is not None:
            add_last(self, param)
        return param.grad_accum if _ranks(self) > 1 else get_gradient_for_reduction(self, param)

    return {_OPTIMIZER + "get_gradient_for_reduction": accumulated}


def _reached(optimizer: Any) -> str | None:
    if not _repairs(optimizer) or _ranks(optimizer) == 1:
        return None
    dtypes = f"a model in {optimizer.dtype}, sums in {optimizer.gradient_accumulation_dtype}"
    return f"ZeRO stage 1, {dtypes}, {_ranks(optimizer)} data-parallel ranks"


def _target(name: str, *shapes: str) -> Target:
    return Target(_OPTIMIZER + name, frozenset(shapes))


# Shapes of the releases 0.14.0 to 0.19.7; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.accumulator_reduction",
    package="deepspeed",
    advisories=("TF-0006",),
    requires={"deepspeed": ">=0.14.0"},
    targets=(_target("get_gradient_for_reduction", "7ba80a84c30e"),),  # 0.14.0
    relies_on=(
        _target("get_param_gradient_attribute", "e33dedf92716"),  # 0.14.0
        _target("reduce_gradients", "1dd116bd155b", "2ae01fe083f2"),  # 0.14.0, 0.17.2
        _target(
            "reduce_independent_p_g_buckets_and_remove_grads",
            *("248337071f0f", "bbf6e0d3a96d", "99739827d75e", "deb7b4617ba0"),  # 0.14.0, 0.16.3, 0.17.0, 0.17.2
            *("e9adb7295578", "2ded2edbedb9", "2945f54f0bf8", "5f66db0535bf"),  # 0.17.5, 0.18.1, 0.18.2, 0.18.5
            *("0a7056db5dd2", "cca2f19a6dce", "c798f64e6483"),  # 0.18.6, 0.19.3, 0.19.6
        ),
        _target(
            "reduce_ipg_grads",
            *("556e7cd4eca5", "1a8cbd04a064", "74aa3eceed6b", "af45645caf73"),  # 0.14.0, 0.14.1, 0.16.3, 0.17.2
            *("079c882a53d3", "d12b08ac8982", "743eb9f7638c"),  # 0.17.5, 0.18.5, 0.18.8
        ),
        _target(
            "copy_grads_in_partition",
            *("520b1030c47e", "0e05a07a6440", "f9ae4eac6f94", "6e483cd7f843"),  # 0.14.0, 0.17.1, 0.19.0, 0.19.5
        ),
        _target("zero_grad", "c5a33cd374a8"),  # 0.14.0
    ),
    guards=(Guard(_OPTIMIZER + "__init__", {"TF-0006": _reached}),),
    build=build,
    repairs=_repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    limits="the repair covers DeepSpeedZeroOptimizer itself; a subclass (ZenFlow, or a user's) is left alone",
)
