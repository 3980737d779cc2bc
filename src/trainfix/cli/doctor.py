"""``trainfix doctor``: which known silent errors the installed packages have, and which of them this run reaches."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trainfix.cli import base

if TYPE_CHECKING:
    from trainfix.cli.examine import Report


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
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a DeepSpeed JSON config of the run; may be repeated",
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
        "--strict",
        action="store_true",
        help="count every severity and evidence level, and exit 1 where reachability is unknown",
    )
    parser.set_defaults(reasons={})


def run(args: argparse.Namespace) -> int:
    """Examine, render, and return the exit code."""
    from trainfix.cli.examine import examine
    from trainfix.environment.configs import ConfigError, load

    unexplained = [one for one in args.ignore if not (args.reasons.get(one) or "").strip()]
    if unexplained:
        raise base.UsageError(f"--ignore {unexplained[0]} needs its own --reason TEXT right after it")
    base.check_output(args.output)
    try:
        configs = load(args.config)
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


COMMANDS = (
    ("doctor", "which known silent errors the installed packages have, and which this run reaches", options, run),
)
