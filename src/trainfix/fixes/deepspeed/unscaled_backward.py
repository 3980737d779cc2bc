"""`backward(loss, scale_wrt_gas=False)` leaves the gradient undivided, as the caller asked. Repairs TF-0008.

deepspeed#7665 (0.18.3) moved the division by the accumulation steps from the loss to a hook on the model's outputs,
`_backward_prologue_per_tensor`, which divides whatever `backward` was told: a loss that the caller has divided is
divided again. #7724 (0.18.4) hands the argument on to the hook.

What we do instead is the same, but only while such a `backward` runs, so that nothing is left to a later one, nor to a
`loss.backward()` of the caller's own. A window that began before trainfix came is left as it began.

Delete this file when no supported framework pins DeepSpeed 0.18.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine."

_windows: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # engine in mid-window -> whether we repair that window
_unscaled: WeakSet[Any] = WeakSet()  # engines in such a backward right now


def _in_window() -> Iterator[Any]:
    return (engine for engine, ours in list(_windows.items()) if ours)


def _began_before(engine: Any) -> bool:
    """Whether an engine that trainfix has just met is in mid-window. A loop that sets the boundary does not show it."""
    by_count = engine._is_gradient_accumulation_boundary is None
    return by_count and engine.micro_steps % engine.gradient_accumulation_steps() != 0


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once DeepSpeed is imported."""
    _windows.clear()  # after a revert DeepSpeed's code may have gone on with them
    backward = originals[_ENGINE + "backward"]
    divide = originals[_ENGINE + "_backward_prologue_per_tensor"]

    @wraps(backward)
    def heeding(self: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        ours = _windows.setdefault(self, not _began_before(self))
        if ours and not scale_wrt_gas:
            _unscaled.add(self)
        try:
            return backward(self, loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        finally:
            _unscaled.discard(self)
            if self.is_gradient_accumulation_boundary():
                _windows.pop(self, None)
                window_ended(self)

    @wraps(divide)
    def divide_unless_told(self: Any, grad: Any) -> Any:
        return grad if self in _unscaled else divide(self, grad)

    return {_ENGINE + "backward": heeding, _ENGINE + "_backward_prologue_per_tensor": divide_unless_told}


def _repairs(engine: Any) -> bool:
    return bool(engine.gradient_accumulation_steps() > 1)


def _not_yet_known(engine: Any) -> None:
    """An engine does not show how its `backward` will be called. The guard is there for the ranks to agree."""


def _reached(engine: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> str | None:
    steps = engine.gradient_accumulation_steps()
    if scale_wrt_gas or steps == 1:
        return None
    return f"backward(scale_wrt_gas=False) with gradient_accumulation_steps = {steps}"


def _target(name: str, *shapes: str) -> Target:
    return Target(_ENGINE + name, frozenset(shapes))


# Shapes of 0.18.3.
FIX = Fix(
    name="deepspeed.unscaled_backward",
    package="deepspeed",
    advisories=("TF-0008",),
    requires={"deepspeed": ">=0.18.3"},
    targets=(
        _target("backward", "bc64cd0457ae"),
        _target("_backward_prologue_per_tensor", "3daab96425b5"),
    ),
    relies_on=(
        _target("forward", "f3fbf0f9d05a"),
        _target("is_gradient_accumulation_boundary", "c25a5a590665"),
    ),
    guards=(
        Guard(_ENGINE + "__init__", {"TF-0008": _not_yet_known}),
        Guard(_ENGINE + "backward", {"TF-0008": _reached}),
    ),
    build=build,
    repairs=_repairs,
    group=lambda engine: engine.seq_data_parallel_group,
    in_window=_in_window,
)
