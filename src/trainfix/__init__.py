"""trainfix repairs silent training errors in the installed stack: put ``import trainfix`` into the training script.

Where the import stands does not matter. Public names: `status`, `apply`, `revert`, `ledger`, `UnfixedBugError`,
`UnbalancedError`, `__version__`.
"""

from __future__ import annotations

import sys

from trainfix.engine.finder import activate

__version__ = "0.1.0"
__all__ = ["UnbalancedError", "UnfixedBugError", "__version__", "apply", "ledger", "revert", "status"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from trainfix.engine.errors import UnbalancedError, UnfixedBugError
    from trainfix.engine.lifecycle import apply, revert, status
    from trainfix.ledger.session import ledger

_PUBLIC = {
    "status": "trainfix.engine.lifecycle",
    "apply": "trainfix.engine.lifecycle",
    "revert": "trainfix.engine.lifecycle",
    "UnfixedBugError": "trainfix.engine.errors",
    "UnbalancedError": "trainfix.engine.errors",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'trainfix' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    if name == "ledger":  # the package can be called
        return import_module("trainfix.ledger")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


def _is_command_line() -> bool:
    """Whether this process is trainfix's own command, which examines a stack and is no run to be repaired itself."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # what runpy leaves there while it imports the package of `python -m trainfix`
        return ["-m", "trainfix"] in [sys.orig_argv[i : i + 2] for i in range(len(sys.orig_argv))]
    return program.replace("\\", "/").rpartition("/")[2] in ("trainfix", "trainfix.exe")


if not _is_command_line():
    activate()
