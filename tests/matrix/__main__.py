"""``python -m tests.matrix [--render] [RELEASE...]``: run what is missing or out of date, two releases at a time."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests import matrix
from tests.matrix.render import rendered
from tests.support.releases import RELEASES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help="run these (default: all that are out of date)")
    parser.add_argument("--render", action="store_true", help="only write the tables made from docs/matrix.json")
    options = parser.parse_args()
    unknown = set(options.releases) - set(RELEASES)
    if unknown:
        parser.error(f"no such release under test: {', '.join(sorted(unknown))}")
    rows = matrix.load()
    if not options.render:
        digest = matrix.digest()
        stale = [version for version in RELEASES if rows.get(version, {}).get("digest") != digest]
        _run(options.releases or stale, rows)
    for file, text in rendered().items():
        Path(file).write_text(text)
    bad = [f"{version}: {text}" for version, row in rows.items() for text in row["complaints"]]
    print("\n".join(bad) or f"{len(rows)} releases, no complaints", file=sys.stderr)
    return 1 if bad else 0


def _run(versions: list[str], rows: dict[str, matrix.Row]) -> None:
    """Run these releases; each row is saved as soon as it is there, so a stopped run goes on where it was."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(matrix.run, version) for version in versions]
        for done, job in enumerate(as_completed(jobs), start=1):
            row = job.result()
            rows[row["release"]] = row
            matrix.save(rows)
            progress = f"[{done}/{len(jobs)}] {row['release']}: {len(row['complaints'])} complaints"
            print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
