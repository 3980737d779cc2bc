"""What `.pre-commit-hooks.yaml` starts: doctor on each config file of a commit, one after the other.

Each file is taken for the config of a run of its own, so each is judged alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainfix.cli import base, doctor, main
from trainfix.environment.printable import printable

_INTERRUPTED = 130
_GRAVEST_FIRST = (_INTERRUPTED, base.USAGE, base.UNREPAIRED, base.UNDECIDED)


def run(argv: Sequence[str]) -> int:
    """Run doctor with the options in `argv` on each of the files at its end, and return the gravest exit code."""
    files = _files(argv)
    if files is None:
        return main(["doctor", *argv])  # it says what is wrong
    options = argv[: len(argv) - len(files)]
    codes = set[int]()
    for file in files:
        print(f"== {printable(file)}", flush=True)
        codes.add(main(["doctor", *options, "--config", file]))
        if _INTERRUPTED in codes:
            break
    return next((code for code in _GRAVEST_FIRST if code in codes), base.OK)


def _files(argv: Sequence[str]) -> Sequence[str] | None:
    """The words at the end that no option of doctor takes; None where another word is not taken."""
    parser = base.Parser(prog="trainfix doctor")
    doctor.options(parser)
    try:
        _, left = parser.parse_known_args(argv)
    except base.UsageError:
        return None
    last = argv[len(argv) - len(left) :]
    return last if list(last) == left and not any(word.startswith("-") for word in left) else None


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
