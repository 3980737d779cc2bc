"""``python -m tests.matrix [--render] [--only PART] [NAME...]``: run what is missing or out of date, two at a time.

A name is a DeepSpeed release (0.18.9), a row of the losses (``trl 0.18.2 + transformers 4.53.3``), or how such rows
begin (``trl``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests import matrix
from tests.matrix import losses
from tests.matrix.render import rendered
from tests.support.releases import RELEASES

_PARTS = ("deepspeed", "losses")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="run these (default: all that are out of date)")
    parser.add_argument("--only", choices=_PARTS, help="of what is out of date, run this part")
    parser.add_argument("--render", action="store_true", help="only write the pages made from the tables in docs/")
    options = parser.parse_args()
    wanted = losses.rows_wanted()
    named = {name: [row for row in wanted if f"{row} ".startswith(f"{name} ")] for name in options.names}
    unknown = [name for name, rows in named.items() if not rows and name not in RELEASES]
    if unknown:
        parser.error(f"no such release or row under test: {', '.join(sorted(unknown))}")
    if not options.render:
        parts = [options.only] if options.only else _PARTS
        versions, rows = [one for one in named if one in RELEASES], [row for found in named.values() for row in found]
        if "deepspeed" in parts and (versions or not named):
            _deepspeed(versions)
        if "losses" in parts and (rows or not named):
            _losses(rows)
    for file, text in rendered().items():
        Path(file).write_text(text)
    return _complaints()


def _complaints() -> int:
    tables = {"releases of DeepSpeed": matrix.load(), "rows of losses": losses.load()}
    bad = [f"{name}: {text}" for rows in tables.values() for name, row in rows.items() for text in row["complaints"]]
    counts = ", ".join(f"{len(rows)} {what}" for what, rows in tables.items())
    print("\n".join(bad) or f"{counts}, no complaints", file=sys.stderr)
    return 1 if bad else 0


def _deepspeed(versions: Sequence[str]) -> None:
    rows, digest = matrix.load(), matrix.digest()
    stale = [version for version in RELEASES if rows.get(version, {}).get("digest") != digest]
    for version, row in _run(versions or stale, matrix.run):
        rows[version] = row
        matrix.save(rows)


def _losses(names: Sequence[str]) -> None:
    rows, wanted = losses.load(), losses.rows_wanted()
    for name, row in _run(names or losses.stale(rows), lambda name: losses.run(*wanted[name])):
        rows[name] = row
        losses.save(rows)


def _run(names: Sequence[str], run: Callable[[str], matrix.Row]) -> Iterable[tuple[str, matrix.Row]]:
    """Each row as soon as it is there, for the caller to save; so a stopped run goes on where it was."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {pool.submit(run, name): name for name in names}
        for done, job in enumerate(as_completed(jobs), start=1):
            row = job.result()
            yield jobs[job], row
            progress = f"[{done}/{len(jobs)}] {jobs[job]}: {len(row['complaints'])} complaints"
            print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
