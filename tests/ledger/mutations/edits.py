"""Faults as edits of source text: applied while a module is imported, and never by half."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any


@dataclass(frozen=True)
class Edit:
    """In this module, `old` becomes `new`. `old` must be there exactly once."""

    module: str
    old: str
    new: str


class BrokenEditError(Exception):
    """An edit that cannot be made as it is written down: the fault does not exist in this release."""


def rewritten(text: str, edits: list[Edit]) -> str:
    for edit in edits:
        found = text.count(edit.old)
        if found != 1:
            raise BrokenEditError(f"{edit.module}: {found} places, not one, read {edit.old!r}")
        text = text.replace(edit.old, edit.new)
    return text


class Edited(MetaPathFinder):
    """Finds the edited modules, before anybody else does, and loads them from rewritten text."""

    def __init__(self, edits: list[Edit]) -> None:
        self.waiting = {edit.module for edit in edits}
        self._edits = edits
        early = sorted(name for name in self.waiting if name in sys.modules)
        if early:
            raise BrokenEditError(f"imported before it could be edited: {', '.join(early)}")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        # From the path itself: other finders put loaders of their own around it, and will around ours.
        spec = PathFinder.find_spec(name, path)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            raise BrokenEditError(f"{name} is not a module of Python text")
        self.waiting.discard(name)
        spec.loader = _Loader(name, spec.loader.path, [edit for edit in self._edits if edit.module == name])
        return spec

    def check(self) -> None:
        """Raises BrokenEditError where the run never imported what was to be edited."""
        if self.waiting:
            raise BrokenEditError(f"never imported: {', '.join(sorted(self.waiting))}")


class _Loader(SourceFileLoader):
    """No bytecode is read or written: the text counts."""

    def __init__(self, name: str, path: str, edits: list[Edit]) -> None:
        super().__init__(name, path)
        self._edits = edits

    def get_code(self, fullname: str) -> Any:
        text = rewritten(self.get_data(self.path).decode(), self._edits)
        return compile(text, self.path, "exec", dont_inherit=True)


def install(edits: list[Edit]) -> Edited:
    finder = Edited(edits)
    sys.meta_path.insert(0, finder)
    return finder
