"""Which installed packages forbid an upgrade, and how strongly.

By the requirements in their metadata, and by the table ``pins.json``: for what no metadata holds, checks of the version
while the program runs and recommendations, and for lock files, which hold no metadata. A row of it says who (`by`, in
which `releases`) demands what, how the check is switched off (`off`), and where and when we read it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from trainfix.environment.installed import EnvironmentProblem
from trainfix.environment.names import normal

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

TABLE = Path(__file__).with_name("pins.json")
# Strongest first.
Strength = Literal["requires", "runtime-check", "extra", "recommends"]
STRENGTHS: tuple[Strength, ...] = get_args(Strength)


@dataclass(frozen=True)
class Blocker:
    """An installed package whose requirement excludes every repaired release. `by` is its name and version, `off` the
    setting that switches a run-time check off."""

    by: str
    requires: str
    strength: Strength
    off: str | None = None


@dataclass(frozen=True)
class Demand:
    """What one installed package demands of another. `off` is the setting that switches a run-time check off."""

    by: str
    requirement: Requirement
    strength: Strength
    off: str | None = None


@dataclass(frozen=True)
class Pin:
    """One row of the table. `releases` and `requires` are written as in metadata, `read` is a date (ISO 8601)."""

    by: str
    releases: str
    package: str
    requires: str
    strength: Strength
    off: str | None
    source: str
    read: str


def demands(package: str, paths: Sequence[str] | None = None) -> tuple[Demand, ...]:
    """Every demand on `package` of the packages installed along `paths` (default ``sys.path``): by their metadata,
    as far as it applies here, and by the table.

    trainfix itself is left out: its demo pins the release that it demonstrates. Raises EnvironmentProblem as `pins`.
    """
    wanted = re.sub("[-_.]+", "[-_.]+", package)
    asks = re.compile(rf"(?im)^(?:Requires-Dist:)?\s*{wanted}\b(?![-_.]\w)")
    tabled = {pin.by for pin in pins() if pin.package == normal(package)}
    found: dict[str, tuple[Demand, ...]] = {}
    for distribution in distributions(path=list(sys.path if paths is None else paths)):
        text = distribution.read_text("METADATA") or _old_metadata(distribution)
        named = re.search(r"(?im)^Name:[ \t]*(\S+)", text)
        name = normal(named[1]) if named else ""
        if named is None or name in found or name == "trainfix":
            continue  # the first copy on the path is the one that counts
        found[name] = ()
        if name in tabled or asks.search(text):  # parsing all the metadata would take most of doctor's time
            by_table = demands_of(package, {named[1]: distribution.version or ""})
            found[name] = (*_demands(distribution, package), *by_table)
    return tuple(demand for _, those in sorted(found.items()) for demand in those)


def demands_of(package: str, installed: Mapping[str, str]) -> tuple[Demand, ...]:
    """What the table says that `installed` (name -> version) demands of `package`: all that a list of versions tells.

    Raises EnvironmentProblem as `pins`.
    """
    from packaging.requirements import Requirement

    return tuple(
        Demand(f"{name} {version}", Requirement(pin.requires), pin.strength, pin.off)
        for name, version in installed.items()
        for pin in pins()
        if pin.by == normal(name) and pin.package == normal(package) and _is_among(version, pin.releases)
    )


@lru_cache(maxsize=1)
def pins() -> tuple[Pin, ...]:
    """The table. Raises EnvironmentProblem if it cannot be read."""
    try:
        return tuple(Pin(**row) for row in json.loads(TABLE.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        repair = "it is part of trainfix; reinstall it with `pip install --force-reinstall --no-deps trainfix`"
        raise EnvironmentProblem(f"cannot read the table {TABLE}: {error}; {repair}") from error


def blockers(demands: Iterable[Demand], fixed_in: str, *, newest: str) -> tuple[Blocker, ...]:
    """The packages whose demands admit no repaired release, each once, by the strongest of them.

    Repaired are the releases from `fixed_in` on; `newest` is the newest one known.
    """
    found: dict[str, Blocker] = {}
    for demand in demands:
        if _admits(demand.requirement.specifier, fixed_in, newest):
            continue
        written = f"{demand.requirement.name}{demand.requirement.specifier}"
        known = found.get(demand.by)
        if known is None or STRENGTHS.index(demand.strength) < STRENGTHS.index(known.strength):
            found[demand.by] = Blocker(demand.by, written, demand.strength, demand.off)
    return tuple(found.values())


def _old_metadata(distribution: Distribution) -> str:
    """What an egg-info folder says: its name in one file, its requirements in another."""
    return f"{distribution.read_text('PKG-INFO') or ''}\n{distribution.read_text('requires.txt') or ''}"


def _is_among(version: str, releases: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(releases).contains(version, prereleases=True)
    except InvalidVersion:
        return False


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
        if not normal(line).startswith(normal(package)):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # somebody else's broken metadata forbids nothing
        if normal(requirement.name) == normal(package):
            yield requirement
