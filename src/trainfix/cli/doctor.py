"""``trainfix doctor``: which known silent errors the installed packages have, and which of them this run reaches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from trainfix.cli import base, project

if TYPE_CHECKING:
    from trainfix.cli.examine import Report
    from trainfix.environment.installation import Installation
    from trainfix.environment.runconfig import RunConfig

FORMATS = ("text", "json", "sarif", "markdown")


class _Reason(argparse.Action):
    """Pairs each --reason with the --ignore right before it."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        if not namespace.ignore or namespace.ignore[-1] in namespace.reasons:
            raise base.UsageError("--reason TEXT belongs right after the --ignore ID that it explains")
        namespace.reasons = {**namespace.reasons, namespace.ignore[-1]: values}


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of doctor."""
    _examined(parser)
    _judged(parser)
    base.add_report_options(parser, FORMATS)
    parser.add_argument(
        "--issue", action="store_true", help="print a block to paste into an issue instead of the report"
    )
    parser.set_defaults(reasons={})


def _examined(parser: argparse.ArgumentParser) -> None:
    """What is looked at."""
    from trainfix.environment.configs import KINDS

    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="how the run is configured: a DeepSpeed JSON, an accelerate, transformers, TRL, LLaMA-Factory or axolotl "
        "file, a script with the command line, the folder of a saved run; may be repeated for files of one run",
    )
    parser.add_argument(
        "--kind", type=base.one_of("kind", KINDS), metavar="KIND", help=f"read every --config as {', '.join(KINDS)}"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--site",
        metavar="WHERE",
        help="examine another environment: a virtual or conda environment, a site-packages folder or an interpreter",
    )
    where.add_argument(
        "--lock",
        metavar="FILE",
        help="examine versions only: requirements.txt, pip freeze output, uv.lock, poetry.lock or pylock.toml",
    )
    where.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="examine what a checkpoint's trainfix.json says of its run",
    )


def _judged(parser: argparse.ArgumentParser) -> None:
    """How it is judged."""
    parser.add_argument(
        "--assume-import", action="store_true", help="judge as if the training script had `import trainfix` in it"
    )
    parser.add_argument("--only", action="append", type=base.advisory_id, metavar="ID", help="judge this advisory only")
    parser.add_argument(
        "--ignore", action="append", default=[], type=base.advisory_id, metavar="ID", help="never count this advisory"
    )
    parser.add_argument("--reason", action=_Reason, metavar="TEXT", help="why the --ignore before it is right here")
    parser.add_argument(
        "--prove", action="store_true", help="also run the experiments of what is found, and say what they showed"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="count every severity and evidence level, and exit 1 where reachability is unknown",
    )


def run(args: argparse.Namespace) -> int:
    """Examine, render, and return the exit code."""
    from trainfix.cli.examine import examine

    unexplained = [one for one in args.ignore if not (args.reasons.get(one) or "").strip()]
    if unexplained:
        raise base.UsageError(f"--ignore {unexplained[0]} needs its own --reason TEXT right after it")
    project.apply(args)
    if args.prove and (args.site or args.lock or args.checkpoint):
        raise base.UsageError("--prove runs this environment's packages: leave out --site, --lock and --checkpoint")
    base.check_output(args.output)
    installation, remark = _installation(args)
    report = examine(
        _configs(args),
        installation,
        assume_import=args.assume_import,
        only=args.only,
        ignored=args.reasons,
        strict=args.strict,
    )
    if remark:
        report = replace(report, remarks=(remark, *report.remarks))
    if args.prove:
        report = _proved(report)
    base.write_report(_renderer(args)(report), args.output)
    return report.exit_code


def _configs(args: argparse.Namespace) -> tuple[RunConfig, ...]:
    """The runs; of a checkpoint without a config, what the files beside it tell."""
    from trainfix.environment.configs import ConfigError, holds_run, load

    beside = [args.checkpoint] if args.checkpoint is not None and holds_run(args.checkpoint) else []
    try:
        return load(args.config or beside, args.kind)
    except ConfigError as error:
        raise base.UsageError(f"--config: {error}") from None


def _installation(args: argparse.Namespace) -> tuple[Installation | None, str]:
    """What to examine in place of this interpreter's packages, and what to say of it first."""
    if args.site is not None:
        return _at_site(args.site), ""
    if args.lock is not None:
        return _of_lock(args.lock), ""
    return (None, "") if args.checkpoint is None else _of_checkpoint(args.checkpoint)


def _at_site(where: str) -> Installation:
    from trainfix.environment.installation import at_site
    from trainfix.environment.sites import SiteError

    try:
        return at_site(where)
    except SiteError as error:
        raise base.UsageError(f"--site: {error}") from None


def _of_lock(path: str) -> Installation:
    from trainfix.environment.installation import of_lock
    from trainfix.environment.lockfiles import LockError

    try:
        return of_lock(path)
    except LockError as error:
        raise base.UsageError(f"--lock: {error}") from None


def _of_checkpoint(folder: str) -> tuple[Installation, str]:
    from trainfix.environment.checkpoints import CheckpointError
    from trainfix.environment.installation import of_checkpoint

    try:
        found, meaning = of_checkpoint(folder)
    except CheckpointError as error:
        raise base.UsageError(f"--checkpoint: {error}") from None
    if found is None:
        raise base.Undecided(f"{meaning} For a verdict by versions give what it was trained with: --lock FILE")
    return found, meaning


def _proved(report: Report) -> Report:
    """The report with what the experiments of its open findings showed."""
    from trainfix.cli.prove import SECONDS, Progress
    from trainfix.proofs import ChildProblem, prove_all

    ids = [one.advisory.id for one in report.findings if one.advisory.proof and not one.settled]
    progress = Progress(sys.stderr)
    try:
        records = prove_all(ids, progress=progress, seconds=SECONDS)
    except ChildProblem as error:
        raise base.Undecided(str(error)) from error
    except KeyboardInterrupt:
        progress.interrupted()
        raise
    return replace(report, proofs={record["id"]: record for record in records})


def _renderer(args: argparse.Namespace) -> Callable[[Report], str]:
    if args.issue:
        from trainfix.cli.markdown import issue_block

        return issue_block
    if args.format == "json":
        from trainfix.cli.json import doctor_json

        return doctor_json
    if args.format == "sarif":
        from trainfix.cli.sarif import doctor_sarif

        return doctor_sarif
    if args.format == "markdown":
        from trainfix.cli.markdown import doctor_markdown

        return doctor_markdown
    from trainfix.cli import page
    from trainfix.cli.text import doctor_text

    return lambda report: doctor_text(report, colour=base.colours(args.output), width=page.width(args.output))


COMMANDS = (
    ("doctor", "which known silent errors the installed packages have, and which this run reaches", options, run),
)
