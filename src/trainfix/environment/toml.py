"""TOML as data: through the standard library, or tomli on Python 3.10."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


class TomlProblem(ValueError):
    """A text is not TOML that can be used. The message says why, and the next step."""


def loads(text: str) -> dict[str, Any]:
    """The tables of `text`. Raises TomlProblem."""
    try:
        reader = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise TomlProblem("Python 3.10 needs tomli for it; `pip install 'trainfix[cli]'` brings it") from None
    try:
        return dict(reader.loads(text))
    except RecursionError:
        raise TomlProblem("nested too deeply; write it again") from None
    except ValueError as error:
        raise TomlProblem(f"not valid TOML: {error}; write it again") from None
