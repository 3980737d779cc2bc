"""Waits for the first import of a package that trainfix repairs, and imports trainfix then.

Imported at the start of every interpreter below ``trainfix run`` and of an environment with ``trainfix enable``, under
this top-level name and without the package trainfix, whose own import costs several times as much. Interpreters that
trainfix does not support come by too: the syntax here is that of Python 3.6.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# The top-level packages of trainfix.engine.targets.TARGETS, which tests/activation keeps equal, and torch, with whose
# import the fixes of third parties are looked for.
PACKAGES = frozenset(("accelerate", "deepspeed", "llamafactory", "openrlhf", "torch", "torchao", "transformers", "trl"))
OLDEST = (3, 10)
INSIDE = os.path.join("trainfix", "activation", "bootstrap")
HOME = os.path.dirname(os.path.abspath(__file__))[: -len(INSIDE) - 1]  # the folder that holds the package trainfix

RAY_HOOK = "RAY_RUNTIME_ENV_HOOK"  # Ray's own: the function that ray.init asks for the workers' environment
OUR_RAY_HOOK = "trainfix.activation.ray_workers.hook"
USERS_RAY_HOOK = "_TRAINFIX_USERS_RAY_HOOK"


class Waiting:
    """Looks for `PACKAGES`, and for trainfix where the interpreter's own environment has none."""

    done = False

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name == "trainfix":
            return self._trainfix(target)
        if name == "ray":
            _reach_ray_workers()
        if self.done or name not in PACKAGES:
            return None
        activate()
        self.done = True  # not before: another thread that imports a package meanwhile waits in `activate`
        # The import under way is in the middle of sys.meta_path and would pass over the finder that trainfix put first.
        first = sys.meta_path[0]
        return None if first is self else first.find_spec(name, path, target)

    def _trainfix(self, target: "ModuleType | None") -> "ModuleSpec | None":
        """The environment's own trainfix, or else the one this file belongs to. Nothing else of its folder is found."""
        for place in (None, [HOME]):
            for finder in sys.meta_path:
                find = None if finder is self else getattr(finder, "find_spec", None)
                spec = None if find is None else find("trainfix", place, target)
                if spec is not None and spec.origin is not None:  # a folder without __init__.py has no origin
                    return spec  # type: ignore[no-any-return]
        return None


def activate() -> None:
    """Import trainfix. Raises only what trainfix says itself, such as SettingsError for ``TRAINFIX=oof``."""
    if sys.version_info < OLDEST:
        return say("Python {}.{} is too old, 3.10 is needed".format(*sys.version_info))
    try:
        import trainfix  # noqa: F401
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "trainfix":
            raise
        say(f"{type(error).__name__}: {error}; reinstall trainfix: pip install --force-reinstall trainfix")


def say(problem: str) -> None:
    """One line on stderr, whatever `problem` has in it."""
    if sys.stderr is not None:
        sys.stderr.write("trainfix: not active in this process: " + " ".join(problem.split()) + "\n")


def _reach_ray_workers() -> None:
    """Ray's workers need not inherit this process's environment: below ``trainfix run`` our hook passes it on.

    Not set by ``trainfix run`` itself: ray.init fails if the hook cannot be imported, as in an interpreter with -I.
    """
    hook = os.environ.get(RAY_HOOK, "")
    if hook == OUR_RAY_HOOK or not any(part.endswith(INSIDE) for part in _python_path()):
        return
    if hook:
        os.environ[USERS_RAY_HOOK] = hook
    os.environ[RAY_HOOK] = OUR_RAY_HOOK


def _python_path() -> "list[str]":
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


sys.meta_path.insert(0, Waiting())
if not PACKAGES.isdisjoint(sys.modules):
    activate()
