"""Under DeepSpeed a window ends where accelerate ends it, also with an epoch. Repairs TF-0501.

accelerate ends the last window of an epoch with its data (`Accelerator.accumulate`, and transformers' Trainer since
4.46): `sync_gradients` is true there. But up to 1.7.0 DeepSpeedEngineWrapper.backward does not look at it. It calls the
engine's `backward` and `step` for every micro-batch, and the engine counts. So an epoch's incomplete window takes no
step, and its gradients go into the next epoch's first one. accelerate#3630 (1.8.0) sets the engine's boundary from
`sync_gradients` for every micro-batch.

What we do: the same, but only for the micro-batches at which the engine's count says something else; then it counts
from there. So a run without incomplete windows goes through the very same calls as without trainfix, and so does a
loop that leaves accumulation to DeepSpeed alone, whose `sync_gradients` is always true (1.8.0 steps at each of its
micro-batches). What the engine divides by, the configured steps, stays the caller's affair, as it is in 1.8.0 and in
accelerate without DeepSpeed.

Delete this file when no supported framework pins an accelerate older than 1.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Function, Guard, Target, window_ended

_WRAPPER = "accelerate.utils.deepspeed:DeepSpeedEngineWrapper."


@dataclass
class _Seen:
    """What an engine's wrapper has shown so far.

    accumulates: whether `sync_gradients` was ever false, so that accelerate, and not the engine alone, has windows.
    begins: whether the next micro-batch is the first of a window. ours: whether we look after the window under way.
    """

    begins: bool
    accumulates: bool = False
    ours: bool = False


_seen: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()  # by wrapper, while the repair is in place
_unrepaired: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()  # the same where a guard looks on


def _in_window() -> Iterator[Any]:
    return (wrapper for wrapper, seen in list(_seen.items()) if seen.ours and not seen.begins)


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once accelerate is imported."""
    _seen.clear()  # after a revert accelerate's code may have gone on with them
    backward = originals[_WRAPPER + "backward"]

    @wraps(backward)
    def ending_with_the_window(self: Any, loss: Any, **named: Any) -> Any:
        engine, last = self.engine, _synchronises()
        seen = _note(_seen, self, last)
        seen.ours = seen.ours or seen.begins
        seen.begins = last
        try:
            if not seen.ours or not _disagrees(engine, seen, last):
                return backward(self, loss, **named)
            engine.set_gradient_accumulation_boundary(last)
            try:
                return backward(self, loss, **named)
            finally:
                engine.set_gradient_accumulation_boundary(None)  # by its own count again
                if last:  # which goes on from a window's end
                    engine.micro_steps += -engine.micro_steps % engine.gradient_accumulation_steps()
        finally:
            if last:
                seen.ours = False
                window_ended(self)

    return {_WRAPPER + "backward": ending_with_the_window}


def _synchronises() -> bool:
    from accelerate.state import GradientState  # type: ignore[import-untyped]

    return bool(GradientState().sync_gradients)


def _note(known: WeakKeyDictionary[Any, _Seen], wrapper: Any, last: bool) -> _Seen:
    engine = wrapper.engine
    at_start = engine.micro_steps % engine.gradient_accumulation_steps() == 0
    seen = known.setdefault(wrapper, _Seen(begins=at_start))
    seen.accumulates = seen.accumulates or not last
    return seen


def _disagrees(engine: Any, seen: _Seen, last: bool) -> bool:
    """Whether the engine would end its window although accelerate does not, or the other way round."""
    return seen.accumulates and _counts(engine) and bool(engine.is_gradient_accumulation_boundary()) != last


def _counts(engine: Any) -> bool:
    """Whether the engine ends windows by counting to the number of steps that accelerate has too."""
    from accelerate.state import GradientState

    steps = engine.gradient_accumulation_steps()
    if steps == 1 or GradientState().num_steps not in (1, steps):  # 1: transformers' Trainer accumulates by itself
        return False
    by_itself = engine._is_gradient_accumulation_boundary is None and not getattr(engine, "zenflow", False)
    return by_itself and getattr(engine, "managed_gradient_accumulation", lambda: True)()


def _repairs(wrapper: Any) -> bool:
    return bool(wrapper.engine.gradient_accumulation_steps() > 1)


def _not_yet_known(wrapper: Any) -> None:
    """An engine does not show where accelerate will end its windows. The guard is there for the ranks to agree."""


def _reached(wrapper: Any, *args: Any, **named: Any) -> str | None:
    last = _synchronises()
    seen = _note(_unrepaired, wrapper, last)
    if not last or not _disagrees(wrapper.engine, seen, last):
        return None
    steps = wrapper.engine.gradient_accumulation_steps()
    return f"a window ends with the data before it has gradient_accumulation_steps = {steps} micro-batches"


# Shapes of 0.17.1 to 1.7.0; the comment is the first release that has each.
FIX = Fix(
    name="accelerate.partial_window",
    package="accelerate",
    advisories=("TF-0501",),
    requires={"accelerate": ">=0.17.1", "deepspeed": ">=0.14.0"},
    targets=(Target(_WRAPPER + "backward", frozenset({"dd22d6bfe1de"})),),  # 0.17.1
    relies_on=(
        Target("accelerate.state:GradientState._set_sync_gradients", frozenset({"d91900c518bc"})),  # 0.28.0
    ),
    guards=(
        Guard(_WRAPPER + "__init__", {"TF-0501": _not_yet_known}),
        Guard(_WRAPPER + "backward", {"TF-0501": _reached}),
    ),
    build=build,
    repairs=_repairs,
    group=lambda wrapper: None,
    in_window=_in_window,
    limits=(
        "a loader of a single micro-batch is not told from a loop that leaves accumulation to DeepSpeed, and ZenFlow's "
        "own boundary is left alone"
    ),
)
