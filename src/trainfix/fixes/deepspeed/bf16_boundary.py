"""BF16_Optimizer on several ranks: the boundary's micro-batch is averaged like the others. Repairs TF-0007.

BF16_Optimizer adds each micro-batch's gradients to float32 ones, and the engine averages these over the ranks at the
boundary. deepspeed#7665 (0.18.3) moved the adding into `backward_epilogue`, which the engine calls after the averaging:
what the boundary's own micro-batch adds stays the rank's own. Up to 0.18.4 no configuration built a BF16_Optimizer
(its name in the constants had become another's), so 0.18.5 is the first release that shows it. #7985 (0.19.0) calls
`backward_epilogue` first.

What we do instead is the same, at the boundary alone: call it first, and let the call that follows the averaging do
nothing. Nothing is kept from one micro-batch to the next, so even a window that began without trainfix ends right.

Delete this file when no supported framework pins a DeepSpeed older than 0.19.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any
from weakref import WeakSet

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine."
_OPTIMIZER = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer."

_engines: WeakSet[Any] = WeakSet()  # in mid-window
_added: WeakSet[Any] = WeakSet()  # optimizers that have the boundary's micro-batch already


def _ranks(optimizer: Any) -> int:
    return max(getattr(optimizer, "partition_count", ()), default=1)  # missing where there is nothing to train


def _repairs(optimizer: Any) -> bool:
    """With `immediate_grad_update` each gradient is added as soon as autograd has it."""
    return _ranks(optimizer) > 1 and not optimizer.immediate_grad_update


def _in_window() -> Iterator[Any]:
    for engine in list(_engines):
        yield from (engine, engine.optimizer)


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once DeepSpeed is imported."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    _engines.clear()  # after a revert DeepSpeed's code may have gone on with them
    after_backward = originals[_ENGINE + "_backward_epilogue"]
    add = originals[_OPTIMIZER + "backward_epilogue"]

    @wraps(after_backward)
    def add_first(self: Any) -> Any:
        optimizer = self.optimizer
        if not isinstance(optimizer, BF16_Optimizer) or not _repairs(optimizer):
            return after_backward(self)
        if not self.is_gradient_accumulation_boundary():
            _engines.add(self)
            return after_backward(self)
        if self.enable_backward_allreduce and not self.inside_no_sync_ctxt:
            optimizer.backward_epilogue()
            _added.add(optimizer)
        try:
            return after_backward(self)
        finally:
            _added.discard(optimizer)
            _engines.discard(self)
            window_ended(self)
            window_ended(optimizer)

    @wraps(add)
    def add_once(self: Any, *args: Any, **named: Any) -> Any:
        return None if self in _added else add(self, *args, **named)

    return {_ENGINE + "_backward_epilogue": add_first, _OPTIMIZER + "backward_epilogue": add_once}


def _reached(optimizer: Any) -> str | None:
    if not _repairs(optimizer):
        return None
    return f"bf16 with float32 gradient accumulation, ZeRO stage 1, no offload, {_ranks(optimizer)} ranks"


# Shapes of the releases 0.18.5 to 0.18.9; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.bf16_boundary",
    package="deepspeed",
    advisories=("TF-0007",),
    requires={"deepspeed": ">=0.18.5"},
    targets=(
        Target(_ENGINE + "_backward_epilogue", frozenset({"35e17b708b93"})),  # 0.18.3
        Target(_OPTIMIZER + "backward_epilogue", frozenset({"6aeba67cd1a6"})),  # 0.18.3
    ),
    relies_on=(
        Target(_ENGINE + "allreduce_gradients", frozenset({"dce9121330d2", "21251ff7d3fd"})),  # 0.18.0, 0.18.9
        Target(_ENGINE + "buffered_allreduce_fallback", frozenset({"b5f7efeb8941"})),  # 0.14.1
        Target(_ENGINE + "is_gradient_accumulation_boundary", frozenset({"c25a5a590665"})),  # 0.17.5
        Target(_OPTIMIZER + "update_hp_grads", frozenset({"5b7b1ee129ed"})),  # 0.14.0
        Target(_OPTIMIZER + "get_grads_for_reduction", frozenset({"beae5b53d65c"})),  # 0.14.1
        Target(_OPTIMIZER + "backward_prologue", frozenset({"2007849e1b9b"})),  # 0.18.3
    ),
    guards=(Guard(_OPTIMIZER + "__init__", {"TF-0007": _reached}),),
    build=build,
    repairs=_repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    in_window=_in_window,
)
