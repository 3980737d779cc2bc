"""What doctor examines: every advisory against the installed packages and the run's configs.

Everything is read from metadata and source text: nothing of the examined packages is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainfix import settings
from trainfix.activation.found import active_in, enabled_files
from trainfix.advisories import Advisory, Verdict, holds, judge, judge_version, load_all, unmet
from trainfix.advisories.hazards import Hazard, between, in_force
from trainfix.advisories.reach import Reach, reach_any
from trainfix.cli import base
from trainfix.engine.contract import Fix
from trainfix.engine.decide import decide, load_fix, targets_of
from trainfix.environment.blockers import Blocker, Demand, blockers
from trainfix.environment.installation import Installation, here
from trainfix.environment.installed import Distribution, shapes_of, source_text
from trainfix.environment.runconfig import Origin, RunConfig

OPEN = ("affected", "unknown", "unverified")  # verdicts that leave something to say


@dataclass(frozen=True)
class Finding:
    """One advisory against this installation and these configs.

    `places` are the values of the configs that decide. `hazards` is what else changes on the way to the newest release;
    `ignored` the user's reason for leaving it out.
    """

    advisory: Advisory
    installed: str | None
    verdict: str
    by: Literal["shape", "version"] | None = None
    shape: str | None = None
    reachable: Literal["yes", "no", "unknown"] = "no"
    because: tuple[str, ...] = ()
    places: tuple[Origin, ...] = ()
    by_program: bool = False
    program_unsaid: bool = False
    repair: Literal["available", "refused", "none"] = "none"
    repaired_by: str | None = None
    blocked_by: tuple[Blocker, ...] = ()
    hazards: tuple[Hazard, ...] = ()
    notes: tuple[str, ...] = ()
    ignored: str | None = None

    @property
    def repaired(self) -> bool:
        """Whether the next run will be repaired: a prediction."""
        return self.repaired_by is not None

    @property
    def grave(self) -> bool:
        """Whether it is wrong enough, and certain enough, to count without --strict."""
        return self.advisory.severity in ("gradient", "scale") and self.advisory.evidence_level == "proved"

    @property
    def counts(self) -> bool:
        """Whether it counts for the exit code without --strict. What only the program can reach does where one line
        repairs it; where nothing does, every run of such a config would be called doubtful for ever."""
        return self.grave and not (self.by_program and self.repair == "none")

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to do about it."""
        return self.ignored is not None or self.reachable == "no" or self.repaired or self.verdict not in OPEN

    def exit_code(self, *, strict: bool) -> int:
        """What this finding alone means for the exit code."""
        if self.settled or not (self.counts or strict):
            return base.OK
        if self.verdict == "affected" and (self.reachable == "yes" or strict):
            return base.UNREPAIRED
        return base.UNDECIDED


@dataclass(frozen=True)
class Report:
    """All that doctor has to say. `remarks` concern the installation as a whole; `hazards` are the changed defaults
    that rule a run now, each with the config that leaves it to the default; `detailed` asks for every finding in full.
    `site` and `lock` name the environment or file that was examined in place of this interpreter's packages; with a
    `lock`, by versions only. `proofs` has what an experiment showed, by the advisory's id.
    """

    catalogue: str
    python: str | None
    packages: Mapping[str, str]
    active: bool
    configs: tuple[str, ...]
    remarks: tuple[str, ...]
    findings: tuple[Finding, ...]
    hazards: tuple[tuple[Hazard, str], ...]
    strict: bool
    detailed: bool
    site: str | None = None
    lock: str | None = None
    proofs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 before 3 before 0."""
        codes = {finding.exit_code(strict=self.strict) for finding in self.findings}
        return next((code for code in (base.UNREPAIRED, base.UNDECIDED) if code in codes), base.OK)


def examine(
    configs: Sequence[RunConfig],
    installation: Installation | None = None,
    *,
    assume_import: bool = False,
    only: Sequence[str] | None = None,
    ignored: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Report:
    """Judge every advisory (or those in `only`) against an installation (default: this interpreter's).

    `ignored` maps an advisory's id to the user's reason. Raises RecordError, EnvironmentProblem and ShapeError.
    """
    installation = here() if installation is None else installation
    advisories = [one for one in load_all() if not only or one.id in only]
    examiner = _Examiner(installation, configs, "assumed import" if assume_import else _activation(installation))
    return Report(
        catalogue=max(one.modified for one in load_all())[:10],
        python=installation.python,
        packages=examiner.versions,
        active=examiner.activation is not None and settings.read().mode != "off",
        configs=tuple(config.source for config in configs),
        remarks=(*_active(installation), *_remarks(examiner.copies, examiner.versions, load_all())),
        findings=tuple(replace(examiner.finding(one), ignored=(ignored or {}).get(one.id)) for one in advisories),
        hazards=tuple(
            (hazard, config.source)
            for package, version in examiner.versions.items()
            for config in configs
            for hazard in in_force(package, version, config)
        ),
        strict=strict,
        detailed=bool(only),
        site=None if installation.by_version else installation.source,
        lock=installation.source if installation.by_version else None,
    )


def _activation(installation: Installation) -> str | None:
    """What makes trainfix active in the interpreters of an installation, or None."""
    if installation.paths is None:
        return None
    return active_in(installation.paths, os.environ if installation.source is None else {})


def _active(installation: Installation) -> Iterator[str]:
    """That, and by which file, every interpreter of the installation is active."""
    for file in enabled_files(installation.paths or ()):
        yield f"`trainfix enable` is in force here: {file}"


class _Examiner:
    """Judges one advisory after the other; each function is hashed once.

    `activation`: what makes trainfix active in the run, or None.
    """

    def __init__(self, installation: Installation, configs: Sequence[RunConfig], activation: str | None) -> None:
        known = {name for one in load_all() for name in (one.package, *one.needs)} | {"torch"}
        self.installation = installation
        self.copies = installation.copies(sorted(known))
        self.installed = {package: found[0] for package, found in self.copies.items() if found}
        self.versions = {package: copy.version for package, copy in self.installed.items()}
        self.versions |= {
            package: installation.versions[package] for package in sorted(known & {*installation.versions})
        }
        self.configs = configs
        self.activation = activation
        self.others: dict[str, str | None] = {}
        self.shapes: dict[str, str | None] = {}
        self.demands: dict[str, tuple[Demand, ...]] = {}

    def finding(self, advisory: Advisory) -> Finding:
        package = advisory.package
        if package in self.installation.open:
            known = Finding(advisory, None, "unknown", "version", notes=(self.installation.open[package],))
            return self._open(known, reach_any(advisory, self.configs, self.versions), "")
        if package not in self.versions:
            return Finding(advisory, None, "not-installed", because=(f"{package} is not installed",))
        verdict = self._verdict(advisory)
        known = Finding(advisory, self.versions[package], verdict.verdict, verdict.by, verdict.shape)
        if verdict.verdict not in OPEN:
            why = unmet(advisory, self.versions)
            fine = f"{package} {known.installed} does not have this error"
            return replace(known, because=(f"{fine}: {why}" if why else fine,))
        reach = reach_any(advisory, self.configs, self.versions)
        copy = self.installed.get(package)
        return self._open(known, reach, self._sourceless(advisory, copy, verdict) if copy is not None else "")

    def _verdict(self, advisory: Advisory) -> Verdict:
        if self.installation.by_version:
            return judge_version(advisory, self.versions)
        return judge(advisory, self.versions, self.shapes_of(advisory.evidence))

    def _open(self, known: Finding, reach: Reach, sourceless: str) -> Finding:
        """The finding where the error is or may be: who reaches it, what repairs it, what stands in the way."""
        advisory = known.advisory
        repairing = advisory.repaired_by
        fix = load_fix(repairing.fix) if repairing.fix is not None else None
        obstacle = self._obstacle(repairing, fix) if fix is not None else ""
        available = fix is not None and fix.build is not None and not obstacle
        off = _switched_off(repairing) if available else ""
        limit = fix.limits if fix is not None and available else ""
        return replace(
            known,
            reachable=reach.reachable,
            because=reach.because,
            places=reach.places,
            by_program=reach.by_program,
            program_unsaid=reach.program_unsaid,
            repair="available" if available else "refused" if obstacle else "none",
            repaired_by=self._repaired_by(advisory, repairing, available and not off),
            blocked_by=self._blocked_by(advisory, reach),
            hazards=self._hazards(advisory, reach),
            notes=tuple(note for note in (*known.notes, sourceless or obstacle, off, limit) if note),
        )

    def _repaired_by(self, advisory: Advisory, repairing: Advisory, can: bool) -> str | None:
        """What repairs the run: its checkpoint says so, or trainfix `can` and something activates it."""
        if {advisory.id, repairing.id} & self.installation.repaired:
            return f"the run itself ({self.installation.source})"
        # A loss of precision is repaired only by name, which no import says.
        return self.activation if can and advisory.severity != "precision" else None

    def _obstacle(self, advisory: Advisory, fix: Fix) -> str:
        """Why the engine, by its own decision on the installed text, would not repair `advisory`; empty if it would,
        or if `fix` is there to warn only."""
        if fix.build is None:
            return ""
        if advisory.package not in self.versions:
            return f"{advisory.package}, which is at fault, is not installed"
        for key, why in fix.leaves_alone.items():
            for config in self.configs:
                if config.has(key) and reach_any(advisory, [config], self.versions).reachable != "no":
                    return f"{key} is set ({config.source}): {why}"
        versions = self._versions_of(fix.requires)
        if self.installation.by_version:
            lacking = [f"{one}{spec}" for one, spec in fix.requires.items() if not holds(versions.get(one), spec)]
            return f"the repair was run on {', '.join(lacking)} only" if lacking else ""
        shapes = self.shapes_of(targets_of(fix, [advisory]))
        decision = decide(fix, advisory, versions, shapes)
        return "" if decision.state == "applied" else decision.reason

    def _sourceless(self, advisory: Advisory, copy: Distribution, verdict: Verdict) -> str:
        """The explanation and next step where the source files that decide are missing."""
        if verdict.verdict == "affected":
            return ""
        modules = sorted({target.partition(":")[0] for target in advisory.evidence})
        missing = [module for module in modules if source_text(copy, module) is None]
        if not missing:
            return ""
        return (
            f"{copy.name} {copy.version} in {copy.location} has no source file for {', '.join(missing)} "
            "(only compiled code?), so its code cannot be recognised; reinstall it with "
            f"`pip install --force-reinstall --no-deps {copy.name}=={copy.version}`"
        )

    def _blocked_by(self, advisory: Advisory, reach: Reach) -> tuple[Blocker, ...]:
        """Who forbids the repaired releases. The metadata of all packages is searched once for each package."""
        package = advisory.package
        if advisory.fixed_in is None or reach.reachable == "no":
            return ()
        if package not in self.demands:
            self.demands[package] = self.installation.demands(package)
        return blockers(self.demands[package], advisory.fixed_in, newest=advisory.last_run)

    def _hazards(self, advisory: Advisory, reach: Reach) -> tuple[Hazard, ...]:
        """What else an upgrade would change for these configs, up to the newest release that we know."""
        if advisory.fixed_in is None or reach.reachable == "no" or advisory.package not in self.versions:
            return ()
        return between(advisory.package, self.versions[advisory.package], advisory.last_run, self.configs)

    def _versions_of(self, packages: Iterable[str]) -> dict[str, str]:
        """The versions of these packages, of those too that no advisory speaks of."""
        for name in packages:
            if name not in self.others and name not in self.versions:
                copies = self.installation.copies([name])[name]
                self.others[name] = copies[0].version if copies else self.installation.versions.get(name)
        others = {name: version for name, version in self.others.items() if version is not None}
        return {**others, **self.versions}

    def shapes_of(self, paths: Iterable[str]) -> dict[str, str | None]:
        """path (``module:qualname``) -> shape as installed, ABSENT or None where the function or its source is missing.

        Every package here is named like its module.
        """
        wanted = list(paths)
        by_package: dict[str, list[str]] = {}
        for path in wanted:
            if path not in self.shapes:
                by_package.setdefault(path.partition(".")[0], []).append(path)
        for package, new in by_package.items():
            copy = self.installed.get(package)
            self.shapes |= dict.fromkeys(new, None) if copy is None else shapes_of(copy, new)
        return {path: self.shapes[path] for path in wanted}


def _switched_off(advisory: Advisory) -> str:
    """How the environment switches the repair of `advisory` off; empty if it does not."""
    wanted = settings.read()
    if wanted.mode == "off":
        return "TRAINFIX=off switches every repair off"
    if advisory.id in wanted.disabled:
        return f"TRAINFIX_DISABLE switches the repair of {advisory.id} off"
    return ""


def _remarks(
    copies: Mapping[str, Sequence[Distribution]], versions: Mapping[str, str], advisories: Sequence[Advisory]
) -> Iterator[str]:
    """What to know about the packages before reading the findings."""
    from packaging.version import InvalidVersion, Version

    last_run = {one.package: one.last_run for one in advisories}
    for package, version in versions.items():
        if package not in last_run:
            continue
        found = copies[package]
        if len(found) > 1:
            listed = "; ".join(f"{copy.version} in {copy.location}" for copy in found)
            yield f"{package} is installed {len(found)} times ({listed}): the first is imported, and judged"
        try:
            newer = Version(version) > Version(last_run[package])
        except InvalidVersion:
            yield f"{package} has the version {version!r}, which no standard orders: only its code can be judged"
            continue
        if newer:
            newest = f"{last_run[package]}, the last release in this catalogue"
            yield f"{package} {version} is newer than {newest}; look for a newer trainfix"
