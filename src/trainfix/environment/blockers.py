"""Which installed packages forbid an upgrade, by the requirements in their metadata."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
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


def blockers(package: str, fixed_in: str, *, newest: str, paths: Sequence[str] | None = None) -> tuple[Blocker, ...]:
    """Every installed package along `paths` (default ``sys.path``) that admits no repaired release of `package`.

    Repaired are the releases from `fixed_in` on; `newest` is the newest one known. trainfix itself is left out: its
    demo pins the release that it demonstrates.
    """
    asks = re.compile(rf"(?im)^(?:Requires-Dist:)?\s*{re.sub('[-_.]+', '[-_.]+', package)}\b(?![-_.]\w)")
    found: dict[str, Blocker | None] = {}
    for distribution in distributions(path=list(sys.path if paths is None else paths)):
        text = distribution.read_text("METADATA") or distribution.read_text("requires.txt") or ""
        if not asks.search(text):
            continue  # the quick look: parsing all the metadata would take most of doctor's time
        name = _normal(distribution.metadata["Name"] or "")
        if name not in found and name != "trainfix":  # the first copy on the path is the one that counts
            found[name] = _blocker(distribution, package, fixed_in, newest)
    return tuple(blocker for _, blocker in sorted(found.items()) if blocker is not None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _blocker(distribution: Distribution, package: str, fixed_in: str, newest: str) -> Blocker | None:
    by = f"{distribution.metadata['Name']} {distribution.version}"
    extras = distribution.metadata.get_all("Provides-Extra") or []
    found = []
    for requirement in _requirements(distribution, package):
        if _admits(requirement.specifier, fixed_in, newest):
            continue
        written = f"{requirement.name}{requirement.specifier}"
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            return Blocker(by, written, "requires")
        if any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            found.append(Blocker(by, written, "extra"))
    return found[0] if found else None


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
