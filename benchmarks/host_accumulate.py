"""Adding bf16 gradients to a float32 accumulator on the host: one call, against the chunks that trainfix uses.

    python benchmarks/host_accumulate.py [--elements 30000000] [--rounds 7] [--json FILE]

Prints the median over rounds of time(one call) / time(chunks), both measured in turns in this process, and checks
that both give the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from trainfix.gradcopy import Segment, accumulate


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=30_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gradient = torch.randn(options.elements, dtype=torch.bfloat16)
    one_call, chunks = torch.zeros(options.elements), torch.zeros(options.elements)
    ratios = []
    for _ in range(options.rounds):
        whole = seconds(lambda: one_call.add_(gradient))
        parts = seconds(lambda: accumulate([Segment(chunks, gradient, False)]))
        ratios.append(whole / parts)
    assert torch.equal(one_call, chunks), "the two ways must give the same bits"
    result = {
        "one_call_over_chunks": round(statistics.median(ratios), 2),
        "elements": options.elements,
        "rounds": options.rounds,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
