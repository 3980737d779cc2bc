"""What the GPU benchmarks share: where they run, how they time, and results that are kept step by step."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"

Row = dict[str, Any]


class NoGpu(Exception):
    """The message says what is missing and what can be done."""


class Place:
    """The first GPU, or in a rehearsal the host in its stead, whose times mean nothing."""

    def __init__(self, *, rehearsal: bool) -> None:
        if not rehearsal and not torch.cuda.is_available():
            raise NoGpu(
                f"torch {torch.__version__} finds no GPU here. These benchmarks need one NVIDIA GPU and a torch with "
                "CUDA; --rehearse runs their code on the host, tiny, without a meaning of the times"
            )
        self.rehearsal = rehearsal
        self.device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())

    def scale(self, size: int, rehearsed: int) -> int:
        """`size` on a GPU, `rehearsed` in a rehearsal."""
        return rehearsed if self.rehearsal else size

    def pinned(self, elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[elements], zero, on the host."""
        return torch.zeros(elements, dtype=dtype, pin_memory=not self.rehearsal)

    def synchronize(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize(self.device)

    def stream(self) -> Any:
        """A new one, or None."""
        return None if self.rehearsal else torch.cuda.Stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def mark(self) -> Any:
        """A moment of the current stream, for `between`."""
        if self.rehearsal:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds; after `synchronize`."""
        return end - begin if self.rehearsal else begin.elapsed_time(end) / 1e3

    def peak_above(self, work: Callable[[], object]) -> int:
        """Bytes of the device that `work` takes beyond what is taken before."""
        if self.rehearsal:
            work()
            return 0
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def seconds(place: Place, work: Callable[[], object], repeats: int = 5, warm: int = 1) -> float:
    """Median of the wall time of `work`, from an idle device to an idle device."""
    taken = []
    for _ in range(warm + (1 if place.rehearsal else repeats)):
        place.synchronize()
        begin = time.perf_counter()
        work()
        place.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[warm:])


def hardware(place: Place) -> Row:
    """What the numbers depend on."""
    about: Row = {
        "hardware": "the host, in a rehearsal" if place.rehearsal else torch.cuda.get_device_name(place.device),
        "cores": os.cpu_count(),
        "processor": _first(r"model name\s*: (.*)", "/proc/cpuinfo"),
        "host_memory": _first(r"MemTotal:\s*(.*)", "/proc/meminfo"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": None,
    }
    query = "driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,memory.total,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        about.update(zip(query.split(","), (one.strip() for one in shown.splitlines()[0].split(",")), strict=True))
        about["driver"] = about.pop("driver_version")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as problem:
        about["nvidia-smi"] = f"{type(problem).__name__}: {problem}"
    return about


def _first(pattern: str, file: str) -> str | None:
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found.group(1).strip() if found else None


@dataclass(frozen=True)
class Step:
    """A part of a script that is run and saved as a whole. seconds: about what it takes on one H200."""

    seconds: int
    run: Callable[[Place, argparse.Namespace], list[Row]]


class Saved:
    """One script's results in one file: what they were measured on, and each finished step's rows."""

    def __init__(self, file: Path, *, kind: str = "measured") -> None:
        self.file, self._kind = file, kind
        self.content: dict[str, Any] = {"steps": {}}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))

    def has(self, step: str) -> bool:
        return step in self.content["steps"]

    def put(self, step: str, rows: Sequence[Row], taken: float, about: Mapping[str, Any], question: str) -> None:
        """Write the file anew, so that it is whole whenever it is there."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"date": now, "seconds": round(taken, 1), "about": dict(about), "rows": list(rows)}
        self.content.update(question=question, kind=self._kind, hardware=about["hardware"])
        self.content["steps"][step] = entry
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.file)


def folder_of(place: Place) -> Path:
    name = "rehearsal" if place.rehearsal else torch.cuda.get_device_name(place.device)
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parser(description: str, steps: Mapping[str, Step]) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ", ".join(f"{name} (about {step.seconds} s)" for name, step in steps.items())
    made.add_argument("steps", nargs="*", metavar="STEP", help=f"default: all that are not saved yet of: {listed}")
    made.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/gpu/<hardware>)")
    made.add_argument("--again", action="store_true", help="run also what is saved already")
    made.add_argument("--rehearse", action="store_true", help="tiny, on the host: only to see that the code runs")
    return made


def main(
    script: str,
    question: str,
    steps: Mapping[str, Step],
    options: argparse.Namespace,
) -> int:
    """Run and save the wanted steps, one after the other. 0: all of them are saved now; 1: one failed; 2: usage."""
    unknown = [name for name in options.steps if name not in steps]
    if unknown:
        print(f"error: no step {', '.join(unknown)}; there are {', '.join(steps)}", file=sys.stderr)
        return 2
    try:
        place = Place(rehearsal=options.rehearse)
    except NoGpu as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    folder = options.out or folder_of(place)
    saved = Saved(folder / f"{script}.json", kind="rehearsal" if place.rehearsal else "measured")
    about, failed = hardware(place), False
    for name in options.steps or steps:
        if saved.has(name) and not options.again:
            print(f"{script} {name}: saved already", file=sys.stderr)
            continue
        begin = time.monotonic()
        try:
            rows = steps[name].run(place, options)
        except Exception:  # the other steps may do; this one is not saved, and so runs again the next time
            traceback.print_exc()
            print(f"{script} {name}: FAILED", file=sys.stderr)
            failed = True
            continue
        for row in rows:
            print(json.dumps(row), flush=True)
        saved.put(name, rows, time.monotonic() - begin, about, question)
        print(f"{script} {name}: {time.monotonic() - begin:.0f} s -> {saved.file}", file=sys.stderr, flush=True)
    return int(failed)
