"""``trainfix prove``: each error run on the installed packages, without and with its repair."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from trainfix.cli import base


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of prove."""
    parser.add_argument("ids", nargs="*", type=base.advisory_id, metavar="ID", help="default: every advisory with a proof")
    base.add_report_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the experiments one after the other, render, and return the exit code."""
    from trainfix.advisories import load_all
    from trainfix.proofs import prove

    base.check_output(args.output)
    ids = list(dict.fromkeys(args.ids)) or [one.id for one in load_all() if one.proof]
    proofs = []
    for number, advisory_id in enumerate(ids, 1):
        print(f"trainfix: proof {number} of {len(ids)}: {advisory_id} ...", file=sys.stderr, flush=True)
        proofs.append(prove(advisory_id, named=advisory_id in args.ids))
        print(f"trainfix: {advisory_id} took {proofs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    code = exit_code(proofs)
    base.write_report(_rendered(proofs, code, args), args.output)
    return code


def _rendered(proofs: Sequence[dict[str, Any]], code: int, args: argparse.Namespace) -> str:
    if args.format == "json":
        from trainfix.cli.json import prove_json

        return prove_json(proofs, code)
    from trainfix.cli.text import prove_text

    return prove_text(proofs, code, colour=base.colours(args.output))


def exit_code(proofs: Sequence[dict[str, Any]]) -> int:
    """0 every applicable error is gone with the fix, 1 one is not, 3 one could not be shown."""
    codes = {_one(proof) for proof in proofs}
    return next((code for code in (base.UNREPAIRED, base.UNDECIDED) if code in codes), base.OK)


def _one(proof: dict[str, Any]) -> int:
    if not proof["applicable"]:
        return base.OK
    if not proof["reproduced"]:
        return base.UNDECIDED
    return {True: base.OK, False: base.UNREPAIRED, None: base.UNDECIDED}[proof["repaired"]]


COMMANDS = (("prove", "run each error on the installed packages, without and with the repair", options, run),)
