"""What the copy path of ZeRO-2 with CPU offload moves, launches and waits for, exactly: DeepSpeed's, and trainfix's.

    PYTHONPATH=. python benchmarks/counters.py [--write]

Real DeepSpeed on the CPU accelerator, bf16, one rank, pinned memory asked for, in the steady state; no time is taken.
benchmarks/counted_run.py says how it counts. Prints a table; --write also saves benchmarks/results/counters.json and
puts the table into README.md, between its counters markers. tests/gradcopy/test_counters.py holds what is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "benchmarks" / "results" / "counters.json"
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- counters -->\n).*?(?=<!-- /counters -->)", re.S)

BROKEN, REPAIRED, NEWEST = "0.18.9", "0.19.0", "0.19.8"
TIERS = ("torch", "host-add", "ring", "resident")
VARIANTS = {
    f"{BROKEN}, broken": (BROKEN, None),
    f"{REPAIRED}, upstream's repair": (REPAIRED, None),
    f"{NEWEST}, upstream's newest": (NEWEST, None),
    f"{NEWEST} + trainfix": (NEWEST, "auto"),
    **{f"{BROKEN} + trainfix, {tier}": (BROKEN, tier) for tier in TIERS},
}
ACCUMULATIONS = (4, 8)
SHOWN = 8  # in README.md

Row = dict[str, Any]


def count(variant: str, accumulation: int) -> Row:
    """One run in a process of its own. Raises RuntimeError with its last words where it fails."""
    from tests.support import releases

    version, tier = VARIANTS[variant]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TRAINFIX", "DS_"))}
    paths = [str(releases.release(version)), str(ROOT / "src"), str(ROOT)]
    environment = inherited | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(paths),
        "TRAINFIX": "off" if tier is None else "on",
        "TRAINFIX_GRADCOPY": tier or "auto",
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "counted_run.py"), "--accumulation", str(accumulation)]
    command += [] if tier is None else ["--tier", tier]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{variant}, GA {accumulation}: {done.stderr.strip()[-1500:]}")
    return {"variant": variant, **json.loads(done.stdout)}


def count_all() -> list[Row]:
    """Every variant at every number of accumulation steps, two processes at a time."""
    wanted = [(variant, accumulation) for accumulation in ACCUMULATIONS for variant in VARIANTS]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: count(*one), wanted))


def per_window(row: Row, what: str) -> int:
    """A count over all micro-batches of the window."""
    micro = row["micro_batches"]
    total = micro["first"].get(what, 0) + micro["boundary"].get(what, 0)
    return int(total + (row["accumulation"] - 2) * micro["middle"].get(what, 0))


def per_element(row: Row, what: str) -> float:
    """The same for each element of the partition: bytes. What norms and flags take is a few bytes per parameter."""
    return per_window(row, what) / row["elements"]


def saved(rows: Sequence[Row]) -> dict[str, Any]:
    """What is written to the file."""
    return {
        "question": "bytes, copies, launches and host syncs of the copy path",
        "kind": "counted",
        "hardware": "none: DeepSpeed's CPU accelerator, operations told apart by whose memory they touch",
        "command": "PYTHONPATH=. python benchmarks/counters.py --write",
        "rows": list(rows),
    }


def table(rows: Sequence[Row], accumulation: int) -> str:
    """Markdown, a line per variant."""
    return "\n".join(_table([row for row in rows if row["accumulation"] == accumulation])) + "\n"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| DeepSpeed | to the device, B | to the host, B | both | kernels | copies | host syncs | temporaries, B "
        "| host buffers | error of the sum |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        up, down = (per_element(row, f"{way}_bytes") for way in ("host_to_device", "device_to_host"))
        middle, boundary = row["micro_batches"]["middle"], row["micro_batches"]["boundary"]
        pinned = row["pinned_bytes"]
        held = (
            f"{pinned / row['elements']:.3g} B"
            if row["tier"] in (None, "auto")
            else f"{pinned >> 20} MiB"
            if pinned
            else "none"
        )
        cells = [
            row["variant"],
            *(f"{value:.1f}" for value in (up, down, up + down)),
            f"{_kernels(middle)} / {_kernels(boundary)}",
            f"{_copies(middle)} / {_copies(boundary)}",
            f"{middle.get('syncs', 0)} / {boundary.get('syncs', 0)}",
            f"{per_element(row, 'temporary_bytes'):.1f}",
            held,
            f"{row['relative_error']:.0e}",
        ]
        yield f"| {' | '.join(cells)} |"


def _kernels(counts: Mapping[str, int]) -> int:
    return counts.get("kernels", 0)


def _copies(counts: Mapping[str, int]) -> int:
    return sum(counts.get(f"{way}_copies", 0) for way in ("host_to_device", "device_to_host", "device_to_device"))


def caption(rows: Sequence[Row]) -> str:
    """What the table's numbers are of."""
    row = rows[0]
    return (
        f"Counted, not timed, by `PYTHONPATH=. python benchmarks/counters.py`: ZeRO-2 with CPU offload, bf16, one "
        f"rank, {SHOWN} accumulation steps, {row['parameters']} parameters in {row['buckets']} buckets. Bytes are per "
        "element of the partition and optimizer step; kernels, copies and host syncs are those of a middle micro-batch "
        "/ of the last one with the step. A host sync is a wait for the device. The error is that of the sum which the "
        "optimizer consumed, against float64.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="save the JSON and put the table into README.md")
    options = parser.parse_args(arguments)
    rows = count_all()
    for accumulation in ACCUMULATIONS:
        print(f"{accumulation} accumulation steps\n{table(rows, accumulation)}")
    if options.write:
        SAVED.write_text(json.dumps(saved(rows), indent=1) + "\n", encoding="utf-8")
        text, block = README.read_text(encoding="utf-8"), f"{table(rows, SHOWN)}\n{caption(rows)}"
        README.write_text(BLOCK.sub(lambda _: block, text), encoding="utf-8")
        where = "README.md" if BLOCK.search(text) else "README.md has no counters markers"
        print(f"saved: {SAVED.relative_to(ROOT)}; {where}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
