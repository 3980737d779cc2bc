"""The command ``trainfix``: one module per command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import chain

from trainfix.cli import catalogue, doctor, enable, prove, run, xray
from trainfix.cli.base import OK, UNDECIDED, USAGE, Parser, Undecided, UsageError, nearest

EPILOG = "Exit codes: 0 fine; 1 something reachable is not repaired; 2 usage; 3 could not decide."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default ``sys.argv[1:]``) and return its exit code."""
    from trainfix.advisories import RecordError
    from trainfix.environment.installed import EnvironmentProblem
    from trainfix.environment.shapes import ShapeError
    from trainfix.settings import SettingsError, read

    try:
        read()
        return _run(sys.argv[1:] if argv is None else list(argv))
    except (UsageError, SettingsError) as error:
        return _complain(error, USAGE)
    except (Undecided, RecordError, EnvironmentProblem, ShapeError) as error:
        return _complain(error, UNDECIDED)
    except ImportError as error:
        return _complain(
            f"{error}; reinstall trainfix with its requirements: pip install --force-reinstall trainfix", UNDECIDED
        )
    except BrokenPipeError:  # the reader of our output has gone, as in `trainfix list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return 130


def _complain(error: object, code: int) -> int:
    from trainfix.environment.printable import printable

    print("\n".join(map(printable, f"trainfix: {error}".split("\n"))), file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
    parser, commands = _parsers()
    word = next((word for word in argv if not word.startswith("-")), None)
    if word is not None and word not in commands:
        raise UsageError(nearest(word, list(commands), "command"))
    args, left = parser.parse_known_args(argv)
    if left:
        taken = commands[word].options() if word else parser.options()
        raise UsageError(_not_taken(left, word, taken))
    if word is None:
        parser.print_help()
        return USAGE
    return int(args.run(args))


def _not_taken(left: list[str], command: str | None, options: list[str]) -> str:
    flag = next((word for word in left if word.startswith("-")), None)
    where = f"`trainfix {command}`" if command else "`trainfix`"
    if flag is None:
        return f"{where} does not take {left[0]!r}; see trainfix {command} --help"
    return f"{where}: {nearest(flag.partition('=')[0], options, 'option')}"


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    from trainfix import __version__

    version = f"trainfix {__version__}"
    parser = Parser(prog="trainfix", description="Known silent training errors: find, prove, repair.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=version)
    added = parser.add_subparsers(metavar="COMMAND")
    commands: dict[str, Parser] = {}
    modules = (doctor, prove, xray, catalogue, run, enable)
    for name, about, options, act in chain.from_iterable(module.COMMANDS for module in modules):
        command = commands[name] = added.add_parser(name, help=about, description=about, epilog=EPILOG)
        command.add_argument("--version", action="version", version=version)
        command.set_defaults(run=act)
        options(command)
    return parser, commands
