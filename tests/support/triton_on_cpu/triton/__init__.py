"""A stand-in for Triton, 600 MB that no CPU can use: kernels are defined, and never run.

Liger-Kernel and Unsloth import it; what the tests run of them is plain torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

__version__ = "3.0.0"


class Anything(ModuleType):
    """Any attribute of it is another one; called with a function, as a decorator, it returns the function."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **named: Any) -> Any:
        if len(args) == 1 and not named and callable(args[0]):
            return args[0]
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        own = name.startswith("triton.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec: Any) -> ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(f"triton.{name}")
