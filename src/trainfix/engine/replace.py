"""Finding a live function, seeing through known decorators, putting another in its place, and taking it out again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from trainfix.engine.contract import Function
from trainfix.environment import shapes


class Missing(LookupError):
    """The function is not there. The message names it."""


@dataclass(frozen=True)
class Slot:
    """A place that holds a function: an attribute of a class or module, or a cell inside a known decorator."""

    owner: Any
    name: str

    def get(self) -> Any:
        return self.owner.cell_contents if self.name == "cell_contents" else vars(self.owner).get(self.name)

    def set(self, value: object) -> None:
        setattr(self.owner, self.name, value)

    def same(self, other: Slot) -> bool:
        return self.owner is other.owner and self.name == other.name


@dataclass(frozen=True)
class Entry:
    """One line of the journal: in `slot`, `replacement` stands where `original` stood."""

    slot: Slot
    original: Any
    replacement: Any

    def holder(self) -> str | None:
        """Who has replaced it since, or None if our replacement is still there."""
        live = self.slot.get()
        return None if live is self.replacement else describe(live)


# Every replacement of ours that stands: id -> (itself, what it stands for). Fixes that look at one function see through
# each other's.
_ours: dict[int, tuple[Any, Any]] = {}


def own(live: Any) -> Any:
    """The innermost function behind `live`, seeing through known decorators and through our own replacements."""
    while True:
        cell = shapes.decorator_cell(live) if type(live) is FunctionType else None
        if id(live) in _ours:
            live = _ours[id(live)][1]
        elif cell is not None:
            live = cell.cell_contents
        else:
            return live


def resolve(path: str) -> tuple[Slot, Any]:
    """The slot and the object of ``module:Class.method``; of an inherited method, the class that really defines it.

    Private names are written as in the source, ``Class.__name``.
    Raises Missing when the module, the class or the function is not there.
    """
    module_name, _, qualname = path.partition(":")
    owner: Any = sys.modules.get(module_name)
    *classes, name = qualname.split(".")
    for part in classes:
        owner = getattr(owner, part, None)
    if classes and name.startswith("__") and not name.endswith("__"):
        name = f"_{classes[-1].lstrip('_')}{name}"
    for candidate in getattr(owner, "__mro__", (owner,)):
        if candidate is not None and name in vars(candidate):
            return Slot(candidate, name), vars(candidate)[name]
    raise Missing(f"{path} does not exist")


def inner_slot(slot: Slot, live: Any) -> tuple[Slot, Any]:
    """Where the plain function sits: `slot` itself, or the closure cell of the innermost known decorator."""
    while type(live) is FunctionType:
        cell = shapes.decorator_cell(live)
        if cell is None:
            break
        slot, live = Slot(cell, "cell_contents"), cell.cell_contents
    return slot, live


def live_shape(path: str) -> str | None:
    """Shape of the live function at `path` as its own module defines it; None if it is somebody else's."""
    try:
        _, live = resolve(path)
    except Missing:
        return shapes.ABSENT if path.partition(":")[0] in sys.modules else None
    return shapes.shape_of_function(own(live)) if foreign(path) is None else None


def foreign(path: str) -> str | None:
    """Who else has replaced the function at `path`, told from where it was compiled; None if nobody has."""
    try:
        slot, live = resolve(path)
    except Missing:
        return None
    plain = shapes.unwrap(own(live))
    module = getattr(slot.owner, "__module__", slot.owner.__name__)
    file = str(getattr(sys.modules.get(module), "__file__", ""))
    name = path.partition(":")[2].rpartition(".")[2]
    by_itself = (
        plain is not None
        and plain.__code__.co_name == name
        and (plain.__code__.co_filename == file or (file.endswith(".pyc") and plain.__module__ == module))
    )
    return None if by_itself else describe(live)


def describe(live: Any) -> str:
    """``module.qualname (file:line)`` of a function, as well as it can be told."""
    live = getattr(live, "_self_wrapper", live)  # wrapt's wrappers pass for what they wrap
    module, name = getattr(live, "__module__", None), getattr(live, "__qualname__", type(live).__name__)
    code = getattr(getattr(live, "__func__", live), "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{module}.{name}{place}"


def leads_to(live: Any, function: object, owner: object) -> bool:
    """Whether `live`, which somebody has put at `function`'s place in `owner`, may still call it: it wraps it, or holds
    it in a closure, a default, a global or an attribute of `owner` that its code names."""
    waiting, seen = [live], set[int]()
    while waiting:
        one = waiting.pop()
        if one is function:
            return True
        if isinstance(one, ModuleType):  # torch.classes claims to have whatever it is asked for
            continue
        if id(one) not in seen and (callable(one) or hasattr(one, "func")):  # partialmethod is not
            seen.add(id(one))
            waiting += _held_by(one, owner)
    return False


def _held_by(one: Any, owner: object) -> Iterator[Any]:
    """What a callable holds that it may call."""
    yield from (getattr(one, name, None) for name in ("__wrapped__", "__func__", "func", "_self_wrapper"))
    if not isinstance(one, FunctionType):
        yield from vars(one).values() if hasattr(one, "__dict__") and not isinstance(one, type) else ()
        return
    for cell in one.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield from one.__defaults__ or ()
    yield from (one.__kwdefaults__ or {}).values()
    for name in one.__code__.co_names:
        yield one.__globals__.get(name)
        yield from (vars(cls).get(name) for cls in getattr(owner, "__mro__", ()))


def put(path: str, replacement: Function) -> list[Entry]:
    """Put `replacement` at `path`, inside its known decorators, and, for a module's function, at every alias of it.

    An alias is a module attribute that an earlier ``from x import f`` made. Reads back what it wrote.
    Raises Missing, or RuntimeError when the replacement did not stay.
    """
    outer, live = resolve(path)
    slot, original = inner_slot(outer, live)
    slots = [slot]
    if slot is outer and isinstance(slot.owner, ModuleType):
        slots += [alias for alias in _aliases(live) if not alias.same(slot)]
    done = []
    try:
        for place in slots:
            place.set(replacement)
            done.append(Entry(place, original, replacement))
            _ours[id(replacement)] = replacement, original
            if place.get() is not replacement:
                raise RuntimeError(f"{path} did not keep its replacement")
    except Exception:
        take_out(done)
        raise
    return done


def take_out(entries: Sequence[Entry]) -> None:
    """Put the originals back, in reverse order."""
    for entry in reversed(entries):
        entry.slot.set(entry.original)
        _ours.pop(id(entry.replacement), None)


def standing(journal: Sequence[Entry]) -> list[Entry]:
    """The entries whose replacement is still there, and one more for every alias of a function taken since."""
    found = [entry for entry in journal if entry.holder() is None]
    of_modules = {id(entry.replacement): entry for entry in journal if isinstance(entry.slot.owner, ModuleType)}
    for entry in of_modules.values():
        for alias in _aliases(entry.replacement):
            if not any(alias.same(one.slot) for one in found):
                found.append(Entry(alias, entry.original, entry.replacement))
    return found


def _aliases(function: object) -> list[Slot]:
    return [
        Slot(module, name)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if value is function
    ]
