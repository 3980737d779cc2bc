"""``trainfix prove``: each error run on the installed packages, without and with its repair."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from trainfix.cli import base


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of prove."""
    parser.add_argument(
        "ids", nargs="*", type=base.advisory_id, metavar="ID", help="default: every advisory with a proof"
    )
    base.add_report_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the experiments one after the other, render, and return the exit code."""
    from trainfix.advisories import load_all
    from trainfix.proofs import ChildProblem, exit_code, prove

    base.check_output(args.output)
    ids = list(dict.fromkeys(args.ids)) or [one.id for one in load_all() if one.proof]
    proofs = []
    for number, advisory_id in enumerate(ids, 1):
        print(f"trainfix: proof {number} of {len(ids)}: {advisory_id} ...", file=sys.stderr, flush=True)
        try:
            proofs.append(prove(advisory_id, named=advisory_id in args.ids))
        except ChildProblem as error:
            raise base.Undecided(str(error)) from error
        print(f"trainfix: {advisory_id} took {proofs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    code = exit_code(proofs)
    base.write_report(_rendered(proofs, code, args), args.output)
    return code


def _rendered(proofs: Sequence[dict[str, Any]], code: int, args: argparse.Namespace) -> str:
    if args.format == "json":
        from trainfix.cli.json import prove_json

        return prove_json(proofs, code)
    from trainfix.cli.proof_text import prove_text

    return prove_text(proofs, code, colour=base.colours(args.output))


COMMANDS = (("prove", "run each error on the installed packages, without and with the repair", options, run),)
