"""``[tool.trainfix]`` in the current folder's pyproject.toml: what a project wants of doctor, where no flag says more.

::

    [tool.trainfix]
    config = ["ds.json", "train.yaml"]   # as --config, where none is given
    strict = true                        # as --strict
    ignore = { TF-0009 = "bf16 sums are what we want" }   # as --ignore with --reason
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainfix.cli import base
from trainfix.environment import toml

FILE = "pyproject.toml"


def apply(args: argparse.Namespace) -> None:
    """Add what the project's file says to doctor's arguments. Raises UsageError."""
    wanted = _table(Path(FILE))
    for key, value in wanted.items():
        if key not in _KEYS:
            raise base.UsageError(f"{FILE}, [tool.trainfix]: {base.nearest(key, list(_KEYS), 'key')}")
        fits, what = _KEYS[key]
        if not fits(value):
            raise base.UsageError(f"{FILE}, [tool.trainfix]: {key} = {value!r} is not {what}; correct it")
    args.config = args.config or wanted.get("config", [])
    args.strict = args.strict or wanted.get("strict", False)
    for advisory_id, reason in wanted.get("ignore", {}).items():
        args.reasons = {_known(advisory_id): reason, **args.reasons}


def _known(word: str) -> str:
    try:
        return base.advisory_id(word)
    except argparse.ArgumentTypeError as error:
        raise base.UsageError(f"{FILE}, [tool.trainfix.ignore]: {error}") from None


def _table(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}  # none, or none of ours
    if "tool.trainfix" not in text:
        return {}
    try:
        found = toml.loads(text).get("tool", {}).get("trainfix", {})
    except toml.TomlProblem as error:
        raise base.UsageError(f"{FILE}: {error}") from None
    if not isinstance(found, dict):
        raise base.UsageError(f"{FILE}: tool.trainfix is no table; write [tool.trainfix]")
    return found


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_reasons(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) and one.strip() for one in value.values())


_KEYS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "config": (_are_texts, "a list of file names"),
    "strict": (lambda value: isinstance(value, bool), "true or false"),
    "ignore": (_are_reasons, 'a table of ids and reasons, such as { TF-0009 = "why" }'),
}
