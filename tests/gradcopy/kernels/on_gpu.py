"""Runs both kernels on the GPU that is here against torch on the CPU, and says what is wrong. 0: nothing is.

`python -m tests.gradcopy.kernels.on_gpu`, from the root of the repository, with src on PYTHONPATH. Destinations lie in
the GPU's memory and, the second time, on the host, pinned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from tests.gradcopy.kernels.buckets import complaints
from trainfix.gradcopy.kernels.launches import KernelAdder


def triton(device: torch.device) -> KernelAdder:
    from trainfix.gradcopy.kernels.bucket import TritonAdder

    return TritonAdder(device)


def twin(device: torch.device) -> KernelAdder:
    from trainfix.gradcopy.kernels.twin import TwinAdder

    return TwinAdder(device)


KERNELS: dict[str, Callable[[torch.device], KernelAdder]] = {"Triton": triton, "CUDA C++": twin}


def main() -> int:
    if not torch.cuda.is_available():
        print("error: torch finds no GPU here", file=sys.stderr)
        return 2
    device, worst = torch.device("cuda", torch.cuda.current_device()), 0
    for name, make in KERNELS.items():
        for pinned in (False, True):
            where = "pinned" if pinned else "on the GPU"
            try:
                found = complaints(make(device), pinned=pinned)
            except Exception as problem:  # one kernel that cannot be had leaves the other to be tried
                found = [f"{type(problem).__name__}: {problem}"]
            print(f"{name}, destinations {where}: {len(found)} complaints", *found[:20], sep="\n  ")
            worst = max(worst, bool(found))
    return worst


if __name__ == "__main__":
    sys.exit(main())
