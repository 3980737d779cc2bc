"""Values of a trainer's config, as the programs' parsers take them: a number written as text, a word for true or false.

None stands for what none of them takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from trainfix.environment.configs.draft import Draft
from trainfix.environment.runconfig import Open, shown

_WORDS = MappingProxyType(
    {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
)


def number(value: object) -> int | float | None:
    """A finite number: 1, 1.5, "2e-5"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    if found != found or found in (float("inf"), float("-inf")):
        return None
    return found if isinstance(value, str) else value


def whole(value: object) -> int | None:
    """A positive whole number: 8, 8.0, "8"."""
    found = number(value)
    return int(found) if found is not None and found == int(found) and found > 0 else None


def truth(value: object) -> bool | None:
    """True or false, as a word too."""
    if isinstance(value, bool):
        return value
    return _WORDS.get(str(value).strip().lower()) if isinstance(value, (str, int)) else None


def fraction(value: object) -> int | float | None:
    """A number that is not negative."""
    found = number(value)
    return found if found is not None and found >= 0 else None


_WANTED: Mapping[Callable[[Any], object], str] = MappingProxyType(
    {number: "a number", whole: "a positive whole number", truth: "true or false", fraction: "a number from 0 on"}
)


def written(draft: Draft, name: str, take: Callable[[object], Any]) -> object:
    """What the document says under `name`, as `take` takes it: None if nothing, `Open` if nothing that it takes."""
    value = draft.document.content.get(name)
    if value is None:
        return None
    taken = take(value)
    return Open(f"{said(draft, name)}: not {_WANTED[take]}") if taken is None else taken


def said(draft: Draft, name: str) -> str:
    """``name = value (file)``, a long value cut short."""
    value = shown(draft.document.content.get(name))
    return f"{name} = {value if len(value) <= 60 else value[:57] + '...'} ({draft.source})"
