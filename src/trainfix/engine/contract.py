"""What a fix is: data, and a few small functions. The engine alone replaces, journals and undoes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """A function of the repaired package, written ``module:Class.method`` or ``module:function``.

    `shapes` are the bodies we have read; any other body means refuse. `may_be_replaced` allows that somebody else has
    replaced it before us: only for wrappers that add something before or after, whatever the body does.
    """

    path: str
    shapes: frozenset[str]
    may_be_replaced: bool = False

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.path.partition(":")[2]


@dataclass(frozen=True)
class Guard:
    """Where a run shows that it reaches an error. The engine wraps `path`; `reached` maps an advisory to a predicate
    that gets the call's own arguments and returns the reason, or None.

    A constructor's predicate looks at the object once it is built. Any other method's predicate is asked before the
    call, and only where the repair is not in place.
    """

    path: str
    reached: Mapping[str, Callable[..., str | None]]

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def on_construction(self) -> bool:
        return self.path.endswith(".__init__")


def _nothing_of_the_users(built: object) -> None:
    return None


@dataclass(frozen=True)
class Fix:
    """A run-time repair of one or more advisories in one package.

    name: as in the advisories' records, ``package.module`` below ``trainfix.fixes``.
    targets: what is replaced or wrapped; no two fixes share one. relies_on: neighbours whose meaning the fix assumes;
    unknown there means refuse.
    requires: version specifiers over packages, all of which must hold (``{"deepspeed": ">=0.14.0"}``).
    build: (originals by path, advisories to repair) -> replacements by path. None: there is no repair, only guards,
    which warn of what a run reaches.
    repairs: whether a built object is one that this fix looks after. group: its process group, or None.
    in_window: the objects that are in the middle of a window right now.
    own: what of the user's own an object uses in place of what the fix knows ("own loss: module.qualname"), or None;
    such an object is left alone, which is said once.
    acted: whether the repair has changed anything of an object so far, where the object does not show by itself that it
    would (an error of single calls); what is said of a resumed run goes by it. None: `repairs` shows it.
    notes: what `trainfix.status()` says besides, of the objects that are repaired right now.
    limits: what the repair does not cover, in one sentence. leaves_alone: config keys that show such a run -> why.
    """

    name: str
    package: str
    advisories: tuple[str, ...]
    requires: Mapping[str, str]
    targets: tuple[Target, ...]
    relies_on: tuple[Target, ...]
    guards: tuple[Guard, ...]
    build: Callable[[Mapping[str, Function], frozenset[str]], Mapping[str, Function]] | None
    repairs: Callable[[Any], bool]
    group: Callable[[Any], Any]
    in_window: Callable[[], Iterable[object]] = field(default=tuple)
    own: Callable[[Any], str | None] = _nothing_of_the_users
    acted: Callable[[Any], bool] | None = None
    notes: Callable[[], Iterable[str]] = field(default=tuple)
    limits: str = ""
    leaves_alone: Mapping[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> frozenset[str]:
        """The modules that must be imported before the fix can be decided upon."""
        looked_at: tuple[Target | Guard, ...] = self.targets + self.relies_on or self.guards
        return frozenset(one.module for one in looked_at)


_KEPT = "_trainfix_kept"


def keep_until_window_ends(instance: object, methods: Mapping[str, Function]) -> None:
    """Let `instance`, which is in mid-window, finish it with these methods although its class is being restored."""
    vars(instance).setdefault(_KEPT, {}).update(methods)
    for name, function in methods.items():
        vars(instance)[name] = MethodType(function, instance)


def window_ended(instance: object) -> None:
    """To be called by a fix when a window of `instance` ends: from here on it follows its class again."""
    for name, function in vars(instance).pop(_KEPT, {}).items():
        if getattr(vars(instance).get(name), "__func__", None) is function:
            del vars(instance)[name]
