"""Which installed packages forbid an upgrade, by the requirements in their metadata."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Blocker:
    """An installed package whose requirement excludes every repaired release. `by` is its name and version."""

    by: str
    requires: str
    strength: Literal["requires", "extra"]


@dataclass(frozen=True)
class Demand:
    """What one installed package requires of another."""

    by: str
    requirement: Requirement
    strength: Literal["requires", "extra"]


def demands(package: str, paths: Sequence[str] | None = None) -> tuple[Demand, ...]:
    """Every requirement on `package` that applies here, of the installed packages along `paths` (default ``sys.path``).

    trainfix itself is left out: its demo pins the release that it demonstrates.
    """
    asks = re.compile(rf"(?im)^(?:Requires-Dist:)?\s*{re.sub('[-_.]+', '[-_.]+', package)}\b(?![-_.]\w)")
    found: dict[str, tuple[Demand, ...]] = {}
    for distribution in distributions(path=list(sys.path if paths is None else paths)):
        text = distribution.read_text("METADATA") or distribution.read_text("requires.txt") or ""
        if not asks.search(text):
            continue  # the quick look: parsing all the metadata would take most of doctor's time
        name = _normal(distribution.metadata["Name"] or "")
        if name not in found and name != "trainfix":  # the first copy on the path is the one that counts
            found[name] = tuple(_demands(distribution, package))
    return tuple(demand for _, those in sorted(found.items()) for demand in those)


def blockers(demands: Iterable[Demand], fixed_in: str, *, newest: str) -> tuple[Blocker, ...]:
    """The packages whose demands admit no repaired release, each once, a plain requirement before one in an extra.

    Repaired are the releases from `fixed_in` on; `newest` is the newest one known.
    """
    found: dict[str, Blocker] = {}
    for demand in demands:
        if _admits(demand.requirement.specifier, fixed_in, newest):
            continue
        written = f"{demand.requirement.name}{demand.requirement.specifier}"
        if demand.by not in found or (found[demand.by].strength, demand.strength) == ("extra", "requires"):
            found[demand.by] = Blocker(demand.by, written, demand.strength)
    return tuple(found.values())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _demands(distribution: Distribution, package: str) -> Iterator[Demand]:
    by = f"{distribution.metadata['Name']} {distribution.version}"
    extras = distribution.metadata.get_all("Provides-Extra") or []
    for requirement in _requirements(distribution, package):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield Demand(by, requirement, "requires")
        elif any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield Demand(by, requirement, "extra")


def _admits(specifier: SpecifierSet, fixed_in: str, newest: str) -> bool:
    """Whether a repaired release satisfies `specifier`: the first, the newest, or one that it names (==0.19.1)."""
    from packaging.version import InvalidVersion, Version

    candidates = {Version(fixed_in), Version(newest)}
    for clause in specifier:
        try:
            candidates.add(Version(clause.version.removesuffix(".*")))
        except InvalidVersion:
            continue  # ===anything
    return any(one >= Version(fixed_in) and specifier.contains(one, prereleases=True) for one in candidates)


def _requirements(distribution: Distribution, package: str) -> Iterator[Requirement]:
    from packaging.requirements import InvalidRequirement, Requirement

    for line in distribution.requires or []:
        if not _normal(line).startswith(_normal(package)):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # somebody else's broken metadata forbids nothing
        if _normal(requirement.name) == _normal(package):
            yield requirement
