"""``trainfix doctor``: which known silent errors the installed packages have, and which of them this run reaches.

Everything is read from metadata and source text: nothing of the examined packages is imported.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainfix.cli import base

if TYPE_CHECKING:
    from trainfix.advisories import Advisory
    from trainfix.engine.contract import Fix
    from trainfix.engine.decide import Decision
    from trainfix.environment.blockers import Blocker
    from trainfix.environment.installed import Distribution
    from trainfix.environment.runconfig import RunConfig

# What a fix leaves alone although it has the error: fix -> config key that shows it -> why. The engine's guards say the same
# when such an object is built.
LEFT_ALONE: Mapping[str, Mapping[str, str]] = {
    "deepspeed.offload_accumulation": {
        "zero_optimization.zenflow": "ZenFlow's optimizer inherits the error and is not repaired: training stops with "
        "UnfixedBugError when it is built",
    }
}
# What no config shows: fix -> the limit of the repair.
LIMITS: Mapping[str, str] = {
    "deepspeed.offload_accumulation": "the repair covers DeepSpeedZeroOptimizer itself; a subclass of it is left alone",
}


@dataclass(frozen=True)
class Finding:
    """One advisory against this installation and these configs. `ignored` is the user's reason for leaving it out."""

    advisory: Advisory
    installed: str | None
    verdict: str
    by: Literal["shape", "version"] | None
    shape: str | None
    reachable: Literal["yes", "no", "unknown"]
    because: tuple[str, ...]
    repair: Literal["available", "refused", "none"]
    repaired_by: str | None
    blocked_by: tuple[Blocker, ...]
    notes: tuple[str, ...]
    ignored: str | None

    @property
    def repaired(self) -> bool:
        """Whether the next run will be repaired: a prediction."""
        return self.repaired_by is not None

    def exit_code(self, *, strict: bool) -> int:
        """What this finding alone means for the exit code."""
        advisory = self.advisory
        grave = advisory.severity in ("gradient", "scale") and advisory.evidence_level == "proved"
        if self.ignored is not None or self.reachable == "no" or self.repaired or not (grave or strict):
            return base.OK
        if self.verdict in ("unknown", "unverified"):
            return base.UNDECIDED
        if self.verdict != "affected":
            return base.OK
        return base.UNREPAIRED if self.reachable == "yes" or strict else base.UNDECIDED


@dataclass(frozen=True)
class Report:
    """All that doctor has to say. `remarks` concern the installation as a whole."""

    catalogue: str
    python: str
    packages: Mapping[str, str]
    active: bool
    configs: tuple[str, ...]
    remarks: tuple[str, ...]
    findings: tuple[Finding, ...]
    strict: bool

    @property
    def exit_code(self) -> int:
        """1 before 3 before 0."""
        codes = {finding.exit_code(strict=self.strict) for finding in self.findings}
        return next((code for code in (base.UNREPAIRED, base.UNDECIDED) if code in codes), base.OK)


class _Reason(argparse.Action):
    """Pairs each --reason with the --ignore right before it."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: str | None = None) -> None:
        if not namespace.ignore or namespace.ignore[-1] in namespace.reasons:
            raise base.UsageError("--reason TEXT belongs right after the --ignore ID that it explains")
        namespace.reasons = {**namespace.reasons, namespace.ignore[-1]: values}


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of doctor."""
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a DeepSpeed JSON config of the run; may be repeated"
    )
    parser.add_argument(
        "--assume-import", action="store_true", help="judge as if the training script had `import trainfix` in it"
    )
    base.add_report_options(parser)
    parser.add_argument("--only", action="append", type=base.advisory_id, metavar="ID", help="judge this advisory only")
    parser.add_argument(
        "--ignore", action="append", default=[], type=base.advisory_id, metavar="ID", help="never count this advisory"
    )
    parser.add_argument("--reason", action=_Reason, metavar="TEXT", help="why the --ignore before it is right here")
    parser.add_argument(
        "--strict", action="store_true", help="count every severity and evidence level, and exit 1 where reachability is unknown"
    )
    parser.set_defaults(reasons={})


def run(args: argparse.Namespace) -> int:
    """Examine, render, and return the exit code."""
    from trainfix.environment.runconfig import ConfigError, load

    unexplained = [one for one in args.ignore if not (args.reasons.get(one) or "").strip()]
    if unexplained:
        raise base.UsageError(f"--ignore {unexplained[0]} needs its own --reason TEXT right after it")
    base.check_output(args.output)
    try:
        configs = [load(path) for path in args.config]
    except ConfigError as error:
        raise base.UsageError(f"--config: {error}") from None
    report = examine(
        configs, assume_import=args.assume_import, only=args.only, ignored=args.reasons, strict=args.strict
    )
    base.write_report(_rendered(report, args), args.output)
    return report.exit_code


def _rendered(report: Report, args: argparse.Namespace) -> str:
    if args.format == "json":
        from trainfix.cli.json import doctor_json

        return doctor_json(report)
    from trainfix.cli.text import doctor_text

    return doctor_text(report, colour=base.colours(args.output))


def examine(
    configs: Sequence[RunConfig],
    *,
    assume_import: bool = False,
    only: Sequence[str] | None = None,
    ignored: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Report:
    """Judge every advisory (or those in `only`) against what is installed on ``sys.path``."""
    from trainfix.advisories import load_all
    from trainfix.environment.installed import find

    advisories = [one for one in load_all() if not only or one.id in only]
    copies = {package: find(package) for package in sorted({one.package for one in load_all()} | {"torch"})}
    installed = {package: found[0] for package, found in copies.items() if found}
    shapes = _Shapes(installed)
    findings = tuple(
        _finding(one, installed, shapes, configs, assume_import=assume_import, ignored=(ignored or {}).get(one.id))
        for one in advisories
    )
    return Report(
        catalogue=max(one.modified for one in load_all())[:10],
        python=platform.python_version(),
        packages={package: found.version for package, found in installed.items()},
        active=assume_import and os.environ.get("TRAINFIX", "").strip().lower() != "off",
        configs=tuple(config.source for config in configs),
        remarks=tuple(_remarks(copies, advisories)),
        findings=findings,
        strict=strict,
    )


class _Shapes:
    """Shapes of functions as installed. Each source file is read once, and each function hashed once."""

    def __init__(self, installed: Mapping[str, Distribution]) -> None:
        self.installed = installed
        self.texts: dict[str, str | None] = {}
        self.shapes: dict[str, str | None] = {}

    def of(self, paths: Iterable[str]) -> dict[str, str | None]:
        """path (``module:qualname``) -> shape, None where the source or the function is missing."""
        return {path: self._shape(path) for path in paths}

    def _shape(self, path: str) -> str | None:
        from trainfix.environment.shapes import shape_in_text

        if path not in self.shapes:
            module, _, qualname = path.partition(":")
            text = self.text(module)
            self.shapes[path] = None if text is None else shape_in_text(text, qualname)
        return self.shapes[path]

    def text(self, module: str) -> str | None:
        """The source of `module`; None if it has no source file."""
        from trainfix.environment.installed import source_text

        if module not in self.texts:
            self.texts[module] = source_text(self.installed[module.partition(".")[0]], module)
        return self.texts[module]


def _finding(
    advisory: Advisory,
    installed: Mapping[str, Distribution],
    shapes: _Shapes,
    configs: Sequence[RunConfig],
    *,
    assume_import: bool,
    ignored: str | None,
) -> Finding:
    from trainfix.advisories import judge
    from trainfix.advisories.reach import reach_any

    copy = installed.get(advisory.package)
    if copy is None:
        missing = (f"{advisory.package} is not installed",)
        return Finding(advisory, None, "not-installed", None, None, "no", missing, "none", None, (), (), ignored)
    verdict = judge(advisory, copy.version, shapes.of(advisory.evidence))
    if verdict.verdict not in ("affected", "unknown", "unverified"):
        absent = (f"{copy.name} {copy.version} does not have this error",)
        return Finding(
            advisory, copy.version, verdict.verdict, verdict.by, verdict.shape, "no", absent, "none", None, (), (), ignored
        )
    reach = reach_any(advisory, configs)
    reaching = [config for config in configs if reach_any(advisory, [config]).reachable != "no"]
    repair, obstacle = _repair(advisory, installed, shapes, reaching)
    repaired_by, inactive = _activation(advisory, assume_import) if repair == "available" else (None, "")
    limit = LIMITS.get(advisory.fix or "", "") if repair == "available" else ""
    sourceless = _sourceless(advisory, copy, shapes) if verdict.verdict == "unknown" else ""
    return Finding(
        advisory=advisory,
        installed=copy.version,
        verdict=verdict.verdict,
        by=verdict.by,
        shape=verdict.shape,
        reachable=reach.reachable,
        because=reach.because,
        repair=repair,
        repaired_by=repaired_by,
        blocked_by=_blocked_by(advisory),
        notes=tuple(note for note in (sourceless, obstacle, inactive, limit) if note),
        ignored=ignored,
    )


def _repair(
    advisory: Advisory, installed: Mapping[str, Distribution], shapes: _Shapes, reaching: Sequence[RunConfig]
) -> tuple[Literal["available", "refused", "none"], str]:
    """Whether the engine would repair `advisory` here, by its own decision on the installed text; and what stands against it."""
    if advisory.fix is None:
        return "none", ""
    from trainfix.engine.decide import load_fix

    fix = load_fix(advisory.fix)
    for key, why in LEFT_ALONE.get(advisory.fix, {}).items():
        shown = [config.source for config in reaching if config.has(key)]
        if shown:
            return "refused", f"{key} is set ({', '.join(shown)}): {why}"
    decision = _decision(fix, advisory, installed, shapes)
    return ("available", "") if decision.state == "applied" else ("refused", decision.reason)


def _decision(fix: Fix, advisory: Advisory, installed: Mapping[str, Distribution], shapes: _Shapes) -> Decision:
    from trainfix.engine.decide import decide, targets_of
    from trainfix.environment.installed import find

    found = {package: installed.get(package) or next(iter(find(package)), None) for package in fix.requires}
    versions = {package: copy.version for package, copy in {**found, **installed}.items() if copy is not None}
    return decide(fix, advisory, versions, shapes.of(targets_of(fix, [advisory])))


def _activation(advisory: Advisory, assume_import: bool) -> tuple[str | None, str]:
    """What will activate the repair of `advisory`; or None and, if the environment switches it off, how."""
    from trainfix import settings

    wanted = settings.read()
    if wanted.mode == "off":
        return None, "TRAINFIX=off switches every repair off"
    if advisory.id in wanted.disabled:
        return None, f"TRAINFIX_DISABLE switches the repair of {advisory.id} off"
    return ("assumed import" if assume_import else None), ""


def _sourceless(advisory: Advisory, copy: Distribution, shapes: _Shapes) -> str:
    """The explanation and next step where the deciding source files are missing."""
    modules = sorted({target.partition(":")[0] for target in advisory.evidence})
    missing = [module for module in modules if shapes.text(module) is None]
    if not missing:
        return ""
    return (
        f"{copy.name} {copy.version} in {copy.location} has no source file for {', '.join(missing)} (only compiled code?), so "
        f"its code cannot be recognised; reinstall it with `pip install --force-reinstall --no-deps {copy.name}=={copy.version}`"
    )


def _blocked_by(
    installed: Mapping[str, Distribution], advisories: Sequence[Advisory]
) -> Mapping[tuple[str, str], tuple[Blocker, ...]]:
    """(package, repaired release) -> who forbids it. The metadata of everything installed is searched once for each."""
    from trainfix.environment.blockers import blockers

    wanted = {(one.package, one.fixed_in): one.last_run for one in advisories if one.package in installed}
    return {
        (package, fixed_in): blockers(package, fixed_in=fixed_in, newest=newest)
        for (package, fixed_in), newest in wanted.items()
        if fixed_in is not None
    }


def _remarks(copies: Mapping[str, Sequence[Distribution]], advisories: Sequence[Advisory]) -> Iterable[str]:
    from packaging.version import InvalidVersion, Version

    last_run = {one.package: one.last_run for one in advisories}
    for package, found in copies.items():
        if package not in last_run or not found:
            continue
        if len(found) > 1:
            listed = "; ".join(f"{copy.version} in {copy.location}" for copy in found)
            yield f"{package} is installed {len(found)} times ({listed}): the first is the one that is imported and judged"
        try:
            newer = Version(found[0].version) > Version(last_run[package])
        except InvalidVersion:
            yield f"{package} has the version {found[0].version!r}, which is no PEP 440 version: only its code can be judged"
            continue
        if newer:
            yield f"{package} {found[0].version} is newer than {last_run[package]}, the last release in this catalogue; " + (
                "look for a newer trainfix"
            )


COMMANDS = (("doctor", "which known silent errors the installed packages have, and which this run reaches", options, run),)
