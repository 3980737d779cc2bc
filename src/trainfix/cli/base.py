"""What every command shares: the parser that explains mistakes, the exit codes, and where a report goes."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

OK, UNREPAIRED, USAGE, UNDECIDED = 0, 1, 2, 3


class UsageError(Exception):
    """The command line asks for something that cannot be done. The message names it and what is valid. Exit code 2."""


class Undecided(Exception):
    """The question cannot be answered on this installation. The message says why and the next step. Exit code 3."""


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of leaving the program, and never guesses at shortened options."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")

    def options(self) -> list[str]:
        """Every option this parser takes, as ``--name``."""
        return sorted(name for name in self._option_string_actions if name.startswith("--"))


def nearest(word: str, valid: Sequence[str], kind: str) -> str:
    """The one message for a word that is not in a list: names the nearest entry and lists them all."""
    from difflib import get_close_matches

    near = get_close_matches(word, valid, 1)
    return f"unknown {kind} {word!r}" + (f": did you mean {near[0]}?" if near else ":") + f" valid: {', '.join(valid)}"


def one_of(kind: str, valid: Sequence[str]) -> Callable[[str], str]:
    """An argparse type that admits only the words in `valid`."""

    def check(word: str) -> str:
        if word not in valid:
            raise argparse.ArgumentTypeError(nearest(word, valid, kind))
        return word

    return check


def advisory_id(word: str) -> str:
    """An argparse type: the id of an advisory in the catalogue, in either case."""
    from trainfix.advisories import load_all

    return one_of("advisory", [advisory.id for advisory in load_all()])(word.upper())


def add_report_options(parser: argparse.ArgumentParser, formats: Sequence[str] = ("text", "json")) -> None:
    """--format, the first of `formats` by default, and -o, the same for every command that writes a report."""
    parser.add_argument(
        "--format",
        type=one_of("format", formats),
        default=formats[0],
        metavar="|".join(formats),
        help=f"how to write the report (default: {formats[0]})",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the report to FILE (atomically) instead of stdout"
    )


def check_output(path: str | None) -> None:
    """Raise UsageError if `path` certainly cannot be written, before any long work begins."""
    if path is None:
        return
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        raise UsageError(f"-o {path} is a directory: name a file in it, for example {os.path.join(path, 'report')}")
    if not os.path.isdir(folder):
        raise UsageError(f"-o {path}: {folder} is not a directory; create it or name another file")
    if not os.access(folder, os.W_OK) and not _is_device(path):
        raise UsageError(f"-o {path}: {folder} cannot be written; name a file in a folder that can")


def write_report(report: str, path: str | None) -> None:
    """The whole report to stdout, or to `path` by renaming a complete file into place. Raises UsageError."""
    if path is None:
        sys.stdout.write(report)
        sys.stdout.flush()
        return
    target = os.path.realpath(path)
    draft = target if _is_device(target) else f"{target}.{os.getpid()}.tmp"
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(report)
        if draft != target:
            os.replace(draft, target)
    except OSError as error:
        if draft != target and os.path.exists(draft):
            os.unlink(draft)
        raise UsageError(f"-o {path} cannot be written ({error.strerror}): name a file in a folder that can") from None
    print(f"trainfix: report written to {path}", file=sys.stderr)


def _is_device(path: str) -> bool:
    """Whether `path` is a pipe or device such as /dev/stdout, which is written to and not replaced."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def colours(path: str | None) -> bool:
    """Whether the report may be coloured: only on a terminal, and not against the user's NO_COLOR."""
    terminal = path is None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return terminal and not os.environ.get("NO_COLOR")
