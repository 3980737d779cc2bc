"""The catalogue: one OSV record per advisory, its loader, and the verdict (advisory x installed release x shapes).

What is ours in a record stands under ``database_specific.trainfix``; the rest is plain OSV, readable by any OSV tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

Severity = Literal["gradient", "scale", "precision", "metric", "default"]
Evidence = Literal["proved", "read", "reported"]
ShapeClass = Literal["affected", "fixed", "not-affected", "patched"]
VerdictName = Literal[
    "affected", "not-affected", "fixed-upstream", "fixed-by-source-patch", "unverified", "unknown", "not-installed"
]

RECORDS = Path(__file__).with_name("records")
_PACKAGE = Path(__file__).parent.parent


class RecordError(Exception):
    """A record of the catalogue cannot be read. The message names the file, the key and the next step."""


class UnknownAdvisory(Exception):
    """No advisory has this id. The message lists the valid ones."""


@dataclass(frozen=True)
class Trigger:
    """One condition for reaching the error: `key` with `equals`, `at_least` or `above`; `when`, which no config can
    show; or `any_of` several, one of which is enough."""

    key: str | None = None
    equals: tuple[object, ...] = ()
    at_least: float | None = None
    above: float | None = None
    when: str | None = None
    any_of: tuple[Trigger, ...] = ()


@dataclass(frozen=True)
class SourcePatch:
    """A unified diff under ``patches/<id>/`` and the releases that it applies to (a version specifier)."""

    file: str
    releases: str


@dataclass(frozen=True)
class Advisory:
    """One known silent training error. `evidence` maps target -> shape -> class; `affected` lists the affected releases
    that we ran; `last_run` is the newest release we ran, and no range reaches past it.

    `needs`: other packages, and the releases of them with which the error exists. `through`: the advisory of another
    package whose repair repairs this one.
    """

    id: str
    package: str
    summary: str
    details: str
    modified: str
    severity: Severity
    evidence_level: Evidence
    introduced: str
    fixed_in: str | None
    last_run: str
    affected: tuple[str, ...]
    fix: str | None
    proof: str | None
    evidence: Mapping[str, Mapping[str, ShapeClass]]
    triggers: tuple[Trigger, ...]
    ways_out: Mapping[str, str | None]
    references: tuple[tuple[str, str], ...]
    source_patches: tuple[SourcePatch, ...]
    url: str
    needs: Mapping[str, str] = field(default_factory=dict)
    through: str | None = None

    @property
    def repaired_by(self) -> Advisory:
        """The advisory whose repair counts: its own, or that of the package at fault."""
        return self if self.through is None else load(self.through)


@dataclass(frozen=True)
class Verdict:
    """What one advisory means for one installed release. `shape` is that of the evidence, None if it has no source."""

    verdict: VerdictName
    by: Literal["shape", "version"]
    shape: str | None


@lru_cache(maxsize=1)
def load_all() -> tuple[Advisory, ...]:
    """Every advisory, ordered by id. Raises RecordError for the first record that cannot be read."""
    return tuple(_read(path) for path in sorted(RECORDS.glob("*.json")))


def load(advisory_id: str) -> Advisory:
    """The advisory with this id. Raises UnknownAdvisory, listing the valid ids, or RecordError."""
    for advisory in load_all():
        if advisory.id == advisory_id:
            return advisory
    valid = ", ".join(advisory.id for advisory in load_all())
    raise UnknownAdvisory(f"no advisory {advisory_id!r}; known: {valid}")


def _read(path: Path) -> Advisory:
    repair = "the catalogue is part of trainfix; reinstall it with `pip install --force-reinstall --no-deps trainfix`"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read the record {path}: {error}; {repair}") from error
    try:
        return parse(record)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise RecordError(f"the record {path} is incomplete ({type(error).__name__}: {error}); {repair}") from error


def parse(record: Mapping[str, Any]) -> Advisory:
    """The advisory of an OSV record. Raises KeyError, IndexError, TypeError, AttributeError or ValueError for one that
    is incomplete."""
    ours = record["database_specific"]["trainfix"]
    affected = record["affected"][0]
    events = {key: value for event in affected["ranges"][0]["events"] for key, value in event.items()}
    evidence = {
        target: MappingProxyType({shape: kind for kind, shapes in classes.items() for shape in shapes})
        for target, classes in ours["evidence"].items()
    }
    return Advisory(
        id=record["id"],
        package=affected["package"]["name"],
        summary=record["summary"],
        details=record["details"],
        modified=record["modified"],
        severity=ours["severity"],
        evidence_level=ours["evidence_level"],
        introduced=events["introduced"],
        fixed_in=events.get("fixed"),
        last_run=ours["last_run"],
        affected=tuple(affected["versions"]),
        fix=ours["fix"],
        proof=ours["proof"],
        evidence=MappingProxyType(evidence),
        triggers=tuple(trigger_of(**trigger) for trigger in ours["triggers"]),
        ways_out=MappingProxyType(ours["ways_out"]),
        references=tuple((reference["type"], reference["url"]) for reference in record["references"]),
        source_patches=tuple(SourcePatch(**patch) for patch in ours["source_patches"]),
        url=ours["url"],
        needs=MappingProxyType(ours.get("needs", {})),
        through=ours.get("through"),
    )


def trigger_of(*, equals: object = (), any_of: Sequence[Mapping[str, Any]] = (), **fields: Any) -> Trigger:
    """The trigger of a record or hazard: one value or several in `equals`, triggers in `any_of`."""
    values = tuple(equals) if isinstance(equals, (list, tuple)) else (equals,)
    return Trigger(equals=values, any_of=tuple(trigger_of(**one) for one in any_of), **fields)


def judge(advisory: Advisory, versions: Mapping[str, str], shapes: Mapping[str, str | None]) -> Verdict:
    """The verdict on one installed release, from the shapes of the advisory's evidence functions.

    The shape decides; the version only narrows. `versions` maps package -> installed version, of the advisory's own
    package and of those that it needs. `shapes` maps target -> shape, ``absent`` if the function is missing, None where
    its source is. Without evidence functions (the error is not in Python code) the version alone decides.
    """
    if unmet(advisory, versions) is not None:
        return Verdict("not-affected", "version", None)
    for target, known in advisory.evidence.items():
        shape = shapes.get(target)
        kind = known.get(shape) if shape is not None else None
        if kind is not None:
            return Verdict(_VERDICT_OF[kind], "shape", shape)
    shape = next((shapes[target] for target in advisory.evidence if shapes.get(target)), None)
    return Verdict(_by_version(advisory, versions[advisory.package]), "version", shape)


def judge_version(advisory: Advisory, versions: Mapping[str, str]) -> Verdict:
    """The verdict where only versions are known: ``unknown`` for one in the range that we have not read."""
    verdict = _by_version(advisory, versions[advisory.package])
    if unmet(advisory, versions) is not None:
        verdict = "not-affected"
    elif verdict == "unknown":
        verdict = _by_list(advisory, versions[advisory.package])
    return Verdict(verdict, "version", None)


def _by_list(advisory: Advisory, version: str) -> VerdictName:
    """Whether the release is among those that have the error. A local build (``0.18.9+cu124``) is its release."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(Version(version).public)
    except InvalidVersion:
        return "unknown"
    if any(Version(one) == release for one in advisory.affected):
        return "affected"
    if advisory.fixed_in is not None and release >= Version(advisory.fixed_in):
        return "fixed-upstream"
    known = {Version(one) for other in load_all() if other.package == advisory.package for one in other.affected}
    return "not-affected" if release in known else "unknown"


def unmet(advisory: Advisory, versions: Mapping[str, str]) -> str | None:
    """Which of the packages that the error needs is missing or of another release, in words; None if all are there."""
    for package, specifier in advisory.needs.items():
        if not holds(versions.get(package), specifier):
            return f"it needs {package}{specifier}; installed: {versions.get(package, 'none')}"
    return None


def holds(version: str | None, specifier: str) -> bool:
    """Whether a package is installed in a version that `specifier` allows. False for one that no standard orders."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)
    except InvalidVersion:
        return False


_VERDICT_OF: Mapping[ShapeClass, VerdictName] = {
    "affected": "affected",
    "fixed": "fixed-upstream",
    "not-affected": "not-affected",
    "patched": "fixed-by-source-patch",
}


def _by_version(advisory: Advisory, version: str) -> VerdictName:
    """The verdict where no shape is known: unverified on a newer release than we ran, not affected before the range.

    In the range an unknown body is unknown; where there is no Python code to look at, the range itself decides.
    """
    from packaging.version import InvalidVersion, Version

    try:
        installed = Version(version)
    except InvalidVersion:
        return "unknown"
    if installed > Version(advisory.last_run):
        return "unverified"
    if installed < Version(advisory.introduced):
        return "not-affected"
    if advisory.evidence:
        return "unknown"
    fixed = advisory.fixed_in is not None and installed >= Version(advisory.fixed_in)
    return "fixed-upstream" if fixed else "affected"


def patches_folder() -> Path:
    """The folder of the source patches: in an installed wheel ``trainfix/patches``, in a checkout ``patches``."""
    installed = _PACKAGE / "patches"
    return installed if installed.is_dir() else _PACKAGE.parent.parent / "patches"
