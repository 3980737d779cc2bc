"""What the source of a release has for a default, read from its text."""

from __future__ import annotations

import ast
from functools import lru_cache

from .releases import release


class Missing:
    """The release has no such name."""


@lru_cache(maxsize=64)
def _names(version: str, file: str) -> dict[str, ast.expr]:
    """``CONSTANT`` and ``Class.field`` -> what is assigned; the last assignment at the top counts."""
    path = release(version) / "deepspeed" / file
    names: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
        for inner in node.body if isinstance(node, ast.ClassDef) else (node,):
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                names[prefix + inner.targets[0].id] = inner.value
            elif isinstance(inner, ast.AnnAssign) and inner.value is not None and isinstance(inner.target, ast.Name):
                names[prefix + inner.target.id] = inner.value
    return names


def default_of(version: str, *places: str) -> object:
    """The value at the first of `places` (``runtime/constants.py:NAME``) that the release has, else Missing."""
    for place in places:
        file, _, name = place.partition(":")
        value = _names(version, file).get(name)
        if isinstance(value, ast.Call):  # pydantic's Field(1.0, ge=0.0), Field(default=1.0)
            value = next((one.value for one in value.keywords if one.arg == "default"), None) or value.args[0]
        if value is not None:
            return ast.literal_eval(value)
    return Missing
