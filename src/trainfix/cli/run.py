"""``trainfix run``: any command, with trainfix active in every Python process below it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from trainfix.cli import base

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells have it


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of run."""
    parser.usage = "trainfix run [-h] [--version] [--] COMMAND..."
    parser.epilog = "The exit code is the command's; 127 if there is no such command, 126 if it cannot be started."
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")


def run(args: argparse.Namespace) -> int:
    """Become the command. Returns only if that is not possible."""
    from trainfix.activation import launch

    command = args.command[args.command[:1] == ["--"] :]
    if not command:
        raise base.UsageError(
            "trainfix run needs a command: trainfix run [--] COMMAND..., "
            "for example trainfix run -- torchrun --nproc-per-node 8 train.py"
        )
    for text in launch.warnings(command, os.environ):
        print(f"trainfix: {text}", file=sys.stderr)
    return _become(command, launch.environment(os.environ))


def _become(command: Sequence[str], environ: dict[str, str]) -> int:
    """Replace this process, so that signals and the exit code are the command's own. Returns the code for a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and an ignored signal stays ignored
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), environ)
    except (FileNotFoundError, NotADirectoryError):
        code, problem = NOT_FOUND, "there is no such command"
    except OSError as error:
        code, problem = NOT_EXECUTABLE, f"it cannot be started: {error.strerror}"
    except ValueError as error:  # a NUL byte in an argument
        code, problem = NOT_EXECUTABLE, f"it cannot be started: {error}"
    if command[0].endswith(".py"):
        problem += f"; a script is started with its interpreter: trainfix run -- python {command[0]}"
    print(f"trainfix run: {command[0]!r}: {problem}", file=sys.stderr)
    return code


COMMANDS = (("run", "run a command with trainfix active in every Python below it", options, run),)
