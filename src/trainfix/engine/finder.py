"""The post-import finder: tells the engine when a target module has been executed. Nothing heavy is imported here.

wrapt's own import hooks are not used: importing wrapt costs tens of milliseconds, a hook that raises breaks the user's
import, and a module that is only half imported when the hook is registered would be seen half built.
"""

from __future__ import annotations

import sys

from trainfix import settings
from trainfix.engine.targets import TARGETS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

current = settings.Settings(mode="off")

# Third parties' fixes are looked for when this is imported: what they repair trains with it.
PLUGINS_AT = "torch"


class Finder:
    """Looks only at torch and the names in TARGETS; the finding itself it leaves to the others on ``sys.meta_path``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in TARGETS and name != PLUGINS_AT:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and not isinstance(spec.loader, Loader):
                    spec.loader = Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class Loader:
    """Stands in for a target's own loader until the module is executed, then steps aside."""

    def __init__(self, loader: object) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self.loader, "create_module", None)
        return create(spec) if create is not None else None

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[assignment]
        self.loader.exec_module(module)  # type: ignore[attr-defined]
        if sys.modules.get(module.__name__) is module:  # not a private copy that somebody makes by hand
            imported(module.__name__)


def imported(name: str) -> None:
    """Called after the target module `name` was executed. Raises nothing but UnfixedBugError under TRAINFIX=strict."""
    try:
        # Another thread may be in `import trainfix`, which can need what follows: it goes first, or each would wait
        # for the other.
        import trainfix  # noqa: F401

        if name == PLUGINS_AT:
            _with_torch()
        if current.mode == "off":
            return
        if name == PLUGINS_AT:
            from trainfix.engine import plugins

            return plugins.scan()
        from trainfix.engine import lifecycle
    except ImportError as error:  # a broken installation of trainfix must not break the user's import, nor pass unseen
        next_step = "reinstall trainfix with its requirements"
        sys.stderr.write(f"trainfix: nothing is repaired in {name}: {error}; {next_step}\n")
        return
    lifecycle.on_import(name)


def _with_torch() -> None:
    """The ledger, where one is asked for, begins before anything is trained."""
    if current.ledger is not None:
        from importlib import import_module

        import_module("trainfix.ledger.watch").start(current.ledger)


def activate() -> None:
    """Arm the finder and see to the targets that are imported already. Doing it twice is doing it once."""
    global current
    if _armed():
        return
    current = settings.read()
    for variable in current.unknown:
        from trainfix.engine.report import warn_unknown_variable

        warn_unknown_variable(variable)
    if current.mode != "off" or current.ledger is not None:
        arm()


def switch_on() -> None:
    """``trainfix.apply`` was called: it wins over TRAINFIX=off."""
    global current
    if current.mode == "off":
        kept = {name: getattr(current, name) for name in current.__slots__ if name != "mode"}
        current = settings.Settings(**kept)
        if _armed():  # for the ledger
            catch_up((PLUGINS_AT, *TARGETS))
    arm()


def _armed() -> bool:
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def arm() -> None:
    """Put the finder in place, once, and catch up with what was imported before it."""
    if _armed():
        return
    sys.meta_path.insert(0, Finder())
    catch_up((PLUGINS_AT, *TARGETS))


def catch_up(names: tuple[str, ...]) -> None:
    """See to those of these modules that are imported already."""
    for name in names:
        module = sys.modules.get(name)
        if module is None:
            continue
        if getattr(module.__spec__, "_initializing", False):
            _when_initialized(module)
        else:
            imported(name)


def _when_initialized(module: ModuleType) -> None:
    """`module` is being executed further up this stack, or in another thread: act when the import system marks it done.

    It does so by setting ``__spec__._initializing`` to False, the one event that a module already under way still
    gives.
    """
    spec: Any = module.__spec__
    original: Any = type(spec)

    class Watched(original):  # type: ignore[misc]
        @property
        def _initializing(self) -> bool:
            return bool(vars(self)["_initializing"])

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__class__ = original
            self._initializing = value
            if not value and sys.modules.get(module.__name__) is module:
                imported(module.__name__)

    spec.__class__ = Watched
