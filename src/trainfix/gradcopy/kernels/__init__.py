"""The sum on the GPU: one launch per bucket that adds, widens and takes the sum of squares in one pass.

It is the arithmetic of the torch version bit for bit (of a NaN, that it is one). It moves fewer bytes through the GPU's
own memory, not fewer over the link. Importing this package imports neither triton nor anything that wants a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainfix.gradcopy.segments import Adder


class Unavailable(RuntimeError):
    """No kernel can be had on this device. The message says why, kernel by kernel."""


def adder(device: torch.device) -> Adder:
    """The kernel for this device: Triton, else CUDA C++. It has added a small bucket right before it is returned.

    The first time on a machine that takes seconds, for the compilers. Raises Unavailable; torch is the way out then.
    """
    if device.type != "cuda":
        raise Unavailable(f"there is no kernel for {device}, only for GPUs that torch calls cuda")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _first_that_works(device)


def _first_that_works(device: torch.device) -> Adder:
    reasons = list[str]()
    for name, make in _KERNELS.items():
        try:
            candidate = make(device)
            _try(candidate, device)
        except Exception as problem:  # Triton wants a compiler, NVRTC knows some GPUs: whatever it is, torch is left
            reasons.append(f"{name}: {type(problem).__name__}: {problem}")
        else:
            return candidate
    raise Unavailable(f"no kernel for {device}. " + ". ".join(reasons))


def _triton(device: torch.device) -> Adder:
    from trainfix.gradcopy.kernels.bucket import TritonAdder

    return TritonAdder(device)


def _twin(device: torch.device) -> Adder:
    from trainfix.gradcopy.kernels.twin import TwinAdder

    return TwinAdder(device)


_KERNELS: dict[str, Callable[[torch.device], Adder]] = {"Triton": _triton, "CUDA C++": _twin}


def _try(candidate: Adder, device: torch.device) -> None:
    """Store, then add 17 numbers: two aligned vectors and one element. Raises RuntimeError if the sum is wrong."""
    from trainfix.gradcopy.segments import Segment

    gradient = torch.arange(17, device=device).to(torch.bfloat16)
    destination = torch.full((17,), float("nan"), device=device)
    for first in (True, False):
        segments = [Segment(0, destination, gradient, first)]
        squares = torch.full((sum(candidate.parts(segments)),), float("nan"), dtype=torch.float64, device=device)
        candidate.add(segments, squares)
    right = gradient.float() * 2
    if not torch.equal(destination, right) or float(squares.sum()) != float(right.double().square().sum()):
        raise RuntimeError("it adds wrong on this device")
