"""CPUOffloadOptimizer(offload_gradients=True) keeps the last backward before a step alone. Stops at TF-0601.

Each parameter's hook copies the gradient to the host, over the one that is there, and takes it off the device. The
second backward before a step thus writes over the first; with offload_gradients=False it would hold the sum. torchao
says so ("not compatible with gradient accumulation", since 0.5.0) and does nothing about it.

What we do instead: torchao's hooks are called through ours, which stop the run where a parameter's second gradient
comes before `step` or `zero_grad`, when the first is still on the host. Nothing else changes: what reaches the
optimizer is the same to the bit. Backwards that reach different parameters are right, and go on.

Delete this file when no supported torchao lacks a check of its own, or it adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Guard

_taken: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()  # optimizer -> parameters whose gradient is on the host


def _own_hooks(optimizer: Any) -> Iterator[tuple[dict[int, Any], int]]:
    """Where torchao's hooks for this optimizer stand: (hooks of a parameter, key in them)."""
    for parameter in optimizer.optim_dict:
        hooks = parameter._post_accumulate_grad_hooks or {}
        for key, hook in hooks.items():
            cells = hook.__closure__ or () if type(hook) is FunctionType and not hasattr(hook, "__wrapped__") else ()
            if any(cell.cell_contents is optimizer for cell in cells):
                yield hooks, key


def _look_first(hook: Callable[[Any], None], optimizer: Any, look: Callable[[Any], None]) -> Callable[[Any], None]:
    """torchao's hook, with a look at what it is about to write over."""

    @wraps(hook)
    def looking(parameter: Any) -> None:
        taken = _taken.setdefault(optimizer, set())
        if id(parameter) in taken and parameter in optimizer.queue and parameter.grad is not None:
            look(optimizer)
        hook(parameter)
        if parameter.grad is None:
            taken.add(id(parameter))

    return looking


def _writes_over(optimizer: Any) -> str:
    return "offload_gradients = True, and a parameter's second backward before step()"


def _let_go(optimizer: Any, *args: Any, **kwargs: Any) -> None:
    """`zero_grad`: what is on the host is not wanted any more."""
    _taken.pop(optimizer, None)


def guard(name: str, advisory: str, module: str, requires: str) -> Fix:
    """The guard of the class in one module."""
    optimizer = f"{module}:CPUOffloadOptimizer."
    event = Guard(optimizer + "__init__.<locals>.backward_hook", {advisory: _writes_over})

    def look(built: Any) -> None:
        """Stop as the engine stops at a guard. It can only wrap what has a path, and a closure has none."""
        from trainfix.engine import lifecycle

        lifecycle.look(name, event, built)

    def watch(built: Any) -> None:
        """A built optimizer does not show how often `backward` is called before a step. From here on its hooks look."""
        for hooks, key in list(_own_hooks(built)):
            hooks[key] = _look_first(hooks[key], built, look)

    return Fix(
        name=name,
        package="torchao",
        advisories=(advisory,),
        requires={"torchao": requires},
        targets=(),
        relies_on=(),
        guards=(Guard(optimizer + "__init__", {advisory: watch}), Guard(optimizer + "zero_grad", {advisory: _let_go})),
        build=None,
        repairs=lambda built: False,
        group=lambda built: None,
        limits="trainfix stops such a run and does not repair it",
    )


FIX = guard("torchao.offloaded_gradients", "TF-0601", "torchao.optim.cpu_offload", ">=0.10.0")
