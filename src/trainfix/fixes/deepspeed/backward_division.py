"""`backward(loss)` divides the loss by the accumulation steps exactly once. Repairs TF-0008 and TF-0032.

deepspeed#7665 (0.18.3) moved the division from the loss to a hook on each output of `forward`,
`_backward_prologue_per_tensor`. A hook divides whatever `backward` was told: a loss that the caller has divided is
divided again (TF-0008; #7724, 0.18.4, hands the argument on to the hook). And it divides what passes it, as often as it
passes one (TF-0032): a loss that the model returns together with the logits that it comes from is divided twice, what
comes from `engine.module` never. #8245 (0.19.6) divides the whole loss and turns the hooks off meanwhile.

What we do instead: with `scale_wrt_gas=False` the hooks of 0.18.3 are off while that `backward` runs. Any other loss is
followed through its graph first. Where every way from it to a leaf is divided by the steps, the hooks divide as ever;
else the loss is divided and the hooks are off, as in 0.19.6, with its bits. The hooked outputs are known by a mark in
the metadata of their nodes, which is gone with the node. While there is but one of them (a model that returns its
output, and a loss computed from that), nothing behind it is followed. Nothing waits for the device.
A window that began before trainfix came is left as it began. Where `step` alone ends the windows
(`managed_gradient_accumulation: false`), each backward stands for itself.

Delete this file when no supported framework pins a DeepSpeed older than 0.19.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine."
_HOOKS = "deepspeed.runtime.utils:OutputBackwardHookManager."
_MARK = "trainfix: outputs of an engine"  # in the metadata of a node: list[_Output]


class _Output:
    """One hooked output of an engine's forward. It lives as long as the node of the graph that it is an output of."""

    def __init__(self, engine: Any, number: int) -> None:
        self.engine = ref(engine)
        self.number = number  # among the outputs of its node

    @property
    def divisor(self) -> int:
        engine = self.engine()
        return 1 if engine is None else int(engine.gradient_accumulation_steps())


_outputs: WeakSet[_Output] = WeakSet()
_windows: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # engine in mid-window -> whether we repair that window
_not_dividing: WeakSet[Any] = WeakSet()  # engines whose hooks are off right now
_mended: WeakSet[Any] = WeakSet()  # engines of which they ever were


def _in_window() -> Iterator[Any]:
    return (engine for engine, ours in list(_windows.items()) if ours)


def _began_before(engine: Any) -> bool:
    """Whether an engine that trainfix has just met is in mid-window. A loop that sets the boundary does not show it."""
    by_count = engine._is_gradient_accumulation_boundary is None
    return by_count and engine.micro_steps % engine.gradient_accumulation_steps() != 0


def _ends_by_step(engine: Any) -> bool:
    managed = getattr(engine, "managed_gradient_accumulation", None)  # since 0.19.4
    return managed is not None and not managed()


def _mark(manager: Any, tensor: Any) -> None:
    """Note that the gradient of `tensor` passes a hook of the engine that `manager` hooks for."""
    engine = getattr(manager.preprocess_per_tensor_fn, "__self__", None)
    if engine is not None:
        output = _Output(engine, tensor.output_nr)
        tensor.grad_fn.metadata.setdefault(_MARK, []).append(output)
        _outputs.add(output)


def _wrong_divisor(loss: Any, steps: int) -> int | None:
    """What the hooks divide some part of the gradient of `loss` by, where that is not `steps`; else None."""
    one = len(_outputs) == 1
    ways, seen = [(loss.grad_fn, loss.output_nr, 1)], set()
    while ways:
        node, number, divisor = ways.pop()
        for output in node.metadata.get(_MARK, ()):
            if output.number == number:
                divisor *= output.divisor
        if divisor > steps:
            return divisor
        if (node, divisor) in seen or (one and divisor == steps):
            continue
        seen.add((node, divisor))
        further = [(below, number, divisor) for below, number in node.next_functions if below is not None]
        if not further and divisor != steps:
            return divisor
        ways += further
    return None


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once DeepSpeed is imported."""
    _windows.clear()  # after a revert DeepSpeed's code may have gone on with them
    backward = originals[_ENGINE + "backward"]
    divide = originals[_ENGINE + "_backward_prologue_per_tensor"]
    make_hook = originals[_HOOKS + "_make_backward_hook"]
    heed, whole = ("TF-0008" in advisories), ("TF-0032" in advisories)

    @wraps(backward)
    def divided_once(self: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        steps = self.gradient_accumulation_steps()
        if steps == 1 or getattr(loss, "grad_fn", None) is None:
            return backward(self, loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        off: set[Any] = set()
        if _windows.setdefault(self, not _began_before(self)):
            if not scale_wrt_gas:
                off = {self} if heed else off
            elif whole and _wrong_divisor(loss, steps) is not None:
                off = {self, *(output.engine() for output in list(_outputs))} - {None}
                loss = loss / steps
        _not_dividing.update(off)
        _mended.update(off)
        try:
            result = backward(self, loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
            return loss if off else result  # which DeepSpeed has divided once more
        finally:
            _not_dividing.difference_update(off)
            if _ends_by_step(self) or self.is_gradient_accumulation_boundary():
                _windows.pop(self, None)
                window_ended(self)

    @wraps(divide)
    def divide_unless_off(self: Any, grad: Any) -> Any:
        return grad if self in _not_dividing else divide(self, grad)

    @wraps(make_hook)
    def marking(self: Any, tensor: Any) -> Any:
        _mark(self, tensor)
        return make_hook(self, tensor)

    return {
        _ENGINE + "backward": divided_once,
        _ENGINE + "_backward_prologue_per_tensor": divide_unless_off,
        _HOOKS + "_make_backward_hook": marking,
    }


def _repairs(thing: Any) -> bool:
    """An engine; the hooks of its outputs are made whether it reaches an error or not."""
    steps = getattr(thing, "gradient_accumulation_steps", None)
    return steps is None or bool(steps() > 1)


def _not_yet_known(engine: Any) -> None:
    """An engine does not show how its `backward` will be called. The guard is there for the ranks to agree."""


def _told_not_to(engine: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> str | None:
    steps = engine.gradient_accumulation_steps()
    if scale_wrt_gas or steps == 1:
        return None
    return f"backward(scale_wrt_gas=False) with gradient_accumulation_steps = {steps}"


def _in_part(engine: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> str | None:
    steps = engine.gradient_accumulation_steps()
    if not scale_wrt_gas or steps == 1 or getattr(loss, "grad_fn", None) is None:
        return None
    divisor = _wrong_divisor(loss, steps)
    if divisor is None:
        return None
    return f"gradient_accumulation_steps = {steps}, and backward() divides a part of this loss by {divisor}"


def _target(path: str, *shapes: str) -> Target:
    return Target(path, frozenset(shapes))


# Shapes of the releases 0.18.3 to 0.19.5; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.backward_division",
    package="deepspeed",
    advisories=("TF-0008", "TF-0032"),
    requires={"deepspeed": ">=0.18.3"},
    targets=(
        _target(_ENGINE + "backward", "bc64cd0457ae", "67d8cadff83e", "69398ff33cc9"),  # 0.18.3, 0.18.4, 0.19.4
        _target(
            _ENGINE + "_backward_prologue_per_tensor",
            *("3daab96425b5", "b77b3b03ca80", "dcecad24db40"),  # 0.18.3, 0.18.4, 0.19.1
            "26ca126ff6ab",  # patches/TF-0008 on 0.18.3
        ),
        _target(_HOOKS + "_make_backward_hook", "df466c7d5f7d"),  # 0.18.3
    ),
    relies_on=(
        _target(
            _ENGINE + "forward",
            *("f3fbf0f9d05a", "fe197fc38120", "a8c1af2ffae1", "70a0247cbe6f"),  # 0.18.3, 0.18.5, 0.19.3, 0.19.4
        ),
        _target(_ENGINE + "is_gradient_accumulation_boundary", "c25a5a590665", "7d8927ac8445"),  # 0.17.5, 0.19.4
        _target(_HOOKS + "_traverse_and_register_hooks", "237cad831a07"),  # 0.18.3
    ),
    guards=(
        Guard(_ENGINE + "__init__", {"TF-0008": _not_yet_known, "TF-0032": _not_yet_known}),
        Guard(_ENGINE + "backward", {"TF-0008": _told_not_to, "TF-0032": _in_part}),
        Guard(_HOOKS + "_make_backward_hook", {"TF-0032": _mark}),  # reaches nothing, and lets `_in_part` know
    ),
    build=build,
    repairs=_repairs,
    group=lambda engine: engine.seq_data_parallel_group,
    in_window=_in_window,
    acted=_mended.__contains__,
)
