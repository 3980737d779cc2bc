"""Timing several ways to do one thing, in turns within one process, so that what else the machine does hits all alike.

Times of one round are compared with each other and with nothing else. No thresholds: a time is reported, not judged.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESAMPLES = 2000


def interleaved(works: Mapping[str, Callable[[], object]], *, base: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Time each work once per round, in an order drawn anew for each round; one round before them is not counted.

    Per name: `seconds` (median) and `fastest`; `ratio`, the median over rounds of its time / the base's time of the
    same round, and `interval`, the 95% confidence interval of that median.
    Raises ValueError for a base that is not among the works.
    """
    if base not in works:
        raise ValueError(f"{base!r} is none of {', '.join(works)}")
    order, draw = list(works), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            taken = seconds(works[name])
            if number > 0:
                times[name].append(taken)
    return {name: _summary(times[name], times[base], seed) for name in works}


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interval_of_the_median(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% confidence interval of the median, by the percentile bootstrap."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[round(0.025 * (RESAMPLES - 1))], medians[round(0.975 * (RESAMPLES - 1))]


def environment() -> dict[str, Any]:
    """What the times depend on."""
    import torch

    return {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _summary(times: Sequence[float], base: Sequence[float], seed: int) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(times, base, strict=True)]
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "ratio": round(statistics.median(ratios), 3),
        "interval": [round(end, 3) for end in interval_of_the_median(ratios, seed)],
    }


def _cpu() -> str:
    """The processor's own name where Linux tells it, else the architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
