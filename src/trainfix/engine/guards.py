"""Guards: the places where a run shows that it reaches an error, and the stop if nothing repairs it there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from trainfix.advisories import Advisory
from trainfix.advisories.hazards import between
from trainfix.engine import replace, report
from trainfix.engine.contract import Function, Guard
from trainfix.engine.errors import UnfixedBugError

Reached = Callable[..., None]
HARMFUL = ("gradient", "scale")  # severities


def wrap(guard: Guard, original: Function, look: Reached) -> Function:
    """`original` with the guard around it: `look` gets the built object, or any other call before it is made."""
    try:
        from wrapt import FunctionWrapper
    except ImportError as error:
        raise ImportError(f"{error}; it is one of trainfix's requirements: pip install 'wrapt>=1.16'") from error

    def guarded(wrapped: Function, instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = args if instance is None else (instance, *args)  # inside a decorator it is called as a plain function
        if not guard.on_construction:
            look(*called, **kwargs)
        result = wrapped(*args, **kwargs)
        if guard.on_construction:
            look(called[0])
        return result

    return FunctionWrapper(original, guarded)


def built_before(guard: Guard) -> list[object]:
    """The objects of a constructor guard's class that exist already, built before the guard stood."""
    if not guard.on_construction:
        return []
    cls, _ = replace.resolve(guard.path)
    return [thing for thing in gc.get_objects() if cls.owner in type(thing).__mro__]


def is_built_at(guard: Guard, thing: object) -> bool:
    """Whether it is a constructor guard, and `thing` an object that is built there."""
    if not guard.on_construction:
        return False
    try:
        return replace.resolve(guard.path)[0].owner in type(thing).__mro__
    except replace.Missing:
        return False


def asked(guard: Guard, advisory: Advisory, *args: Any, **kwargs: Any) -> str | None:
    """Why this call reaches the advisory, or None. A predicate that fails breaks no run: it is said."""
    try:
        return guard.reached[advisory.id](*args, **kwargs)
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
        report.warn(f"trainfix: cannot tell whether {advisory.id} is reached: {trouble}", every_rank=True)
        return None


def stop(advisory: Advisory, installed: str, reason: str, why_not: str, *, proved: bool, mode: str) -> None:
    """The run reaches `advisory` and nothing repairs it: raise, or warn once if it is not harmful enough, not proved
    on this very code, or under TRAINFIX=warn."""
    release = advisory.ways_out["upgrade"]
    upgrade = f"move to {advisory.package} {release} or newer" if release else f"no {advisory.package} repairs it yet"
    changes = between(advisory.package, installed, advisory.last_run) if release else ()
    hazards = "".join(f"\n      it also changes: {one.change}" for one in changes)
    absent = f"run `trainfix prove {advisory.id}`; if it shows that the error is absent here"
    if advisory.proof is None:
        absent = "if you have seen that your run is right"
    text = (
        f"{advisory.id} is reached and not repaired: {advisory.summary}.\n"
        f"  why it is reached: {reason}\n"
        f"  why it is not repaired: {why_not} ({advisory.package} {installed})\n"
        "Ways out:\n"
        f"  (1) {upgrade}{hazards}\n"
        f"  (2) change the configuration: {advisory.ways_out['config']}\n"
        f"  (3) {absent}, set TRAINFIX_DISABLE={advisory.id}"
    )
    harmful = advisory.severity in HARMFUL and advisory.evidence_level == "proved" and proved
    if harmful and mode != "warn":
        raise UnfixedBugError(f"{text}\nTRAINFIX=warn turns this stop into a warning.", advisory.id)
    report.warn(text, every_rank=True)
