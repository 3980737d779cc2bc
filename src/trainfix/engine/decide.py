"""The decision, from shapes: the same function for the hook (live functions) and for doctor (installed text)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from trainfix.advisories import Advisory, Verdict, holds, judge, unmet
from trainfix.engine.contract import Fix
from trainfix.environment.shapes import ABSENT

State = Literal[
    "waiting",
    "applied",
    "not-affected",
    "fixed-upstream",
    "fixed-by-source-patch",
    "unverified",
    "refused",
    "failed",
    "disabled",
    "reverted",
]


_NOBODY: Mapping[str, str] = {}
_third_party: dict[str, tuple[Fix, str]] = {}  # name -> the fix, and the distribution and version that ships it


@dataclass(frozen=True)
class Decision:
    """What to do about one advisory. `state` is ``applied`` when the repair may and should be put in place."""

    state: State
    reason: str
    shape: str | None


def load_fix(name: str) -> Fix:
    """The fix of this name. Raises ImportError or AttributeError for a name that no module under trainfix.fixes has,
    and no third party has registered."""
    if name in _third_party:
        return _third_party[name][0]
    fix: Fix = import_module(f"trainfix.fixes.{name}").FIX
    return fix


def register(fix: Fix, shipped_by: str) -> None:
    """From here on `load_fix` knows this fix of a third party, which `shipped_by` (``acme-fixes 1.2``) ships."""
    _third_party[fix.name] = fix, shipped_by


def shipped_by(name: str) -> str | None:
    """The distribution and version that ships the fix of this name, None if it is trainfix's own."""
    return _third_party[name][1] if name in _third_party else None


def targets_of(fix: Fix, advisories: Iterable[Advisory]) -> tuple[str, ...]:
    """Every function whose shape the decision needs."""
    evidence = [path for advisory in advisories for path in advisory.evidence]
    return tuple(dict.fromkeys([*evidence, *(target.path for target in fix.targets + fix.relies_on)]))


def decide(
    fix: Fix | None,
    advisory: Advisory,
    versions: Mapping[str, str],
    shapes: Mapping[str, str | None],
    others: Mapping[str, str] = _NOBODY,
) -> Decision:
    """Decide on `advisory`, which `fix` repairs if anything does, from versions (package -> installed version) and
    shapes (path -> shape, None if unreadable).

    `others` names who has replaced a function before us (path -> description); doctor, which imports nothing, knows
    of nobody.
    """
    installed = versions[advisory.package]
    verdict = judge(advisory, versions, shapes)
    name = f"{advisory.package} {installed}"
    if verdict.verdict == "affected":
        return _repairable(fix, verdict, versions, shapes, others)
    if verdict.verdict == "unverified":
        newest = f"newer than {advisory.last_run}, the last release that trainfix was run on"
        return Decision("unverified", f"{name} is {newest}, and its code is not known", verdict.shape)
    if verdict.verdict == "unknown":
        unknown = "; ".join(_unknown(path, shapes.get(path), others) for path in advisory.evidence)
        return Decision("refused", f"{name}: {unknown}", verdict.shape)
    reasons = {
        "not-affected": unmet(advisory, versions) or f"{name} does not have this error",
        "fixed-upstream": f"{name} has the repaired code",
        "fixed-by-source-patch": f"{name} was repaired with trainfix's source patch",
    }
    state: State = verdict.verdict  # type: ignore[assignment]
    return Decision(state, reasons[verdict.verdict], verdict.shape)


def _repairable(
    fix: Fix | None,
    verdict: Verdict,
    versions: Mapping[str, str],
    shapes: Mapping[str, str | None],
    others: Mapping[str, str],
) -> Decision:
    if fix is None or fix.build is None:
        return Decision("refused", "trainfix knows it and does not repair it", verdict.shape)
    for package, specifier in fix.requires.items():
        if not holds(versions.get(package), specifier):
            found = versions.get(package, "not installed")
            reason = f"the repair was run on {package}{specifier} only; installed: {found}"
            return Decision("unverified", reason, verdict.shape)
    for target in fix.targets + fix.relies_on:
        shape = shapes.get(target.path)
        if shape not in target.shapes and not (target.may_be_replaced and target.path in others):
            return Decision("refused", _unknown(target.path, shape, others), verdict.shape)
    return Decision("applied", "", verdict.shape)


def _unknown(path: str, shape: str | None, others: Mapping[str, str]) -> str:
    qualname = path.partition(":")[2]
    if path in others:
        return f"{qualname} was replaced by {others[path]} before trainfix saw it"
    if shape is None:
        return f"{qualname} has no readable source"
    return f"{qualname} does not exist" if shape == ABSENT else f"{qualname} has an unknown body (shape {shape})"
