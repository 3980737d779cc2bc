"""``trainfix prove``: each error run on the installed packages, without and with its repair."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from trainfix.cli import base

SECONDS = 90.0  # for all proofs together, where the user names none


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of prove."""
    parser.add_argument(
        "ids",
        nargs="*",
        type=base.advisory_id,
        metavar="ID",
        help=f"default: every advisory that applies here and has a proof, the gravest first, within {SECONDS:g} s",
    )
    base.add_report_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the experiments, render, and return the exit code."""
    from trainfix.advisories import load_all
    from trainfix.proofs import ChildProblem, exit_code, prove_all

    base.check_output(args.output)
    ids = list(dict.fromkeys(args.ids)) or [one.id for one in load_all() if one.proof]
    progress = Progress(sys.stderr)
    try:
        proofs = prove_all(ids, named=args.ids, progress=progress, seconds=None if args.ids else SECONDS)
    except ChildProblem as error:
        raise base.Undecided(str(error)) from error
    except KeyboardInterrupt:
        progress.interrupted()
        raise
    code = exit_code(proofs)
    base.write_report(_rendered(proofs, code, args), args.output)
    return code


class Progress:
    """Says on `stream` what is proved, one line per finished proof; on a terminal also what is running now."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._total = 0
        self._done: list[str] = []

    def __call__(self, number: int, total: int, advisory_id: str, record: Mapping[str, Any] | None) -> None:
        self._total, place = total, f"[{number}/{total}] {advisory_id}"
        if record is not None:
            self._done.append(advisory_id)
            self._write(f"{place} {_in_words(record)}, {record['seconds']:.1f} s\n")
        elif self._live:
            self._write(f"{place} ...")

    def interrupted(self) -> None:
        """Say what was done before the interrupt. The children have been stopped."""
        if not self._done:
            self._write("trainfix: interrupted before the first proof was done\n")
            return
        done = f"{len(self._done)} of {self._total} proofs were done: {', '.join(self._done)}"
        self._write(f"trainfix: interrupted; {done}\n")

    def _write(self, text: str) -> None:
        # A line that stands for the moment is written over: back to its start, and to its end all blank.
        self._stream.write(f"\r\033[K{text}" if self._live else text)
        self._stream.flush()


def _in_words(record: Mapping[str, Any]) -> str:
    if record["reproduced"] is None:
        return "could not be run"
    if not record["reproduced"]:
        return "not there" if record["applicable"] is False else "not shown"
    return {True: "shown, gone with the repair", False: "shown, NOT gone with the repair", None: "shown"}[
        record["repaired"]
    ]


def _rendered(proofs: Sequence[Mapping[str, Any]], code: int, args: argparse.Namespace) -> str:
    if args.format == "json":
        from trainfix.cli.json import prove_json

        return prove_json(proofs, code)
    from trainfix.cli.proof_text import prove_text

    return prove_text(proofs, code, colour=base.colours(args.output))


COMMANDS = (("prove", "run each error on the installed packages, without and with the repair", options, run),)
