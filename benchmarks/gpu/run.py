"""Run the GPU benchmarks in the order of their worth, within a time, and say what is done and what is left.

    python benchmarks/gpu/run.py [--minutes 15] [--out DIR] [--release 0.18.9=DIR --release 0.19.8=DIR] [--list]

What is saved already is not run again, so it can be called as often as one likes; a step that does not fit into the
time that is left is left for the next call. One process per step, stopped at three times what it should take. Needs
one NVIDIA GPU, torch with CUDA and this checkout; trainfix need not be installed. Without --release the steps that need
DeepSpeed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Script and steps; first what decides between designs, last what is nice to have.
ORDER = (
    ("links", ("speeds", "pageable")),
    ("kernel", ("correct", "resident", "zero_copy")),
    ("interference", ("tiers", "zero_copy")),
    ("path", ("0.5B", "1.5B")),
    ("end_to_end", ("0.5B-ga8",)),
    ("path", ("7B-quarter",)),
    ("end_to_end", ("0.5B-ga1", "0.5B-ga4")),
    ("links", ("pin",)),
    ("end_to_end", ("1.5B-ga8", "0.5B-ga32")),
)
START = 12  # seconds until a process has imported torch and has a context, at most


class Task(NamedTuple):
    """A step of a script, and about how many seconds it takes with its start."""

    script: str
    step: str
    seconds: int


def tasks() -> Iterator[Task]:
    """All of them, in order."""
    for script, steps in ORDER:
        known = importlib.import_module(f"benchmarks.gpu.{script}").STEPS
        for step in steps:
            yield Task(script, step, known[step].seconds + START)


def is_saved(folder: Path, task: Task) -> bool:
    file = folder / f"{task.script}.json"
    return file.is_file() and task.step in json.loads(file.read_text(encoding="utf-8"))["steps"]


def next_task(left: Sequence[Task], seconds: float) -> Task | None:
    """The first that fits into the time."""
    return next((task for task in left if task.seconds <= seconds), None)


def command(task: Task, options: argparse.Namespace, folder: Path) -> list[str]:
    script = str(ROOT / "benchmarks" / "gpu" / f"{task.script}.py")
    made = [sys.executable, script, task.step, "--out", str(folder)]
    made += ["--rehearse"] if options.rehearse else []
    for release in options.release if task.script == "end_to_end" else []:
        made += ["--release", release]
    return made


def run(task: Task, options: argparse.Namespace, folder: Path, seconds: float) -> str:
    """How it ended: saved, failed or stopped."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    try:
        subprocess.run(
            command(task, options, folder),
            env=environment,
            check=False,
            timeout=max(1.0, min(seconds, 3 * task.seconds)),
        )
    except subprocess.TimeoutExpired:
        return "stopped: out of time"
    return "saved" if is_saved(folder, task) else "failed"


def report(all_tasks: Sequence[Task], folder: Path, ends: Mapping[Task, str]) -> str:
    """A line per task."""
    lines = [f"results: {folder}"]
    for task in all_tasks:
        state = "saved" if is_saved(folder, task) else ends.get(task, "left")
        lines.append(f"  {task.script:13} {task.step:12} about {task.seconds:4} s   {state}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=60, help="do not begin what does not fit (default: 60)")
    made.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/gpu/<hardware>)")
    made.add_argument("--release", action="append", default=[], metavar="VERSION=DIR", help="may be repeated")
    made.add_argument("--list", action="store_true", help="only say what is saved and what is left")
    made.add_argument("--rehearse", action="store_true", help="tiny, on the host: only to see that the code runs")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing is left; 1: something is; 2: there is no GPU."""
    end = time.monotonic()
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    options = parser().parse_args(arguments)
    end += 60 * options.minutes
    from benchmarks.gpu import common

    try:
        place = common.Place(rehearsal=options.rehearse)
    except common.NoGpu as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    folder = (options.out or common.folder_of(place)).resolve()
    everything = [task for task in tasks() if options.release or task.script != "end_to_end"]
    left, ends = [task for task in everything if not is_saved(folder, task)], dict[Task, str]()
    while not options.list and (task := next_task(left, end - time.monotonic())) is not None:
        left.remove(task)
        ends[task] = run(task, options, folder, end - time.monotonic())
    print(report(everything, folder, ends), file=sys.stderr)
    return int(not all(is_saved(folder, task) for task in everything))


if __name__ == "__main__":
    sys.exit(main())
