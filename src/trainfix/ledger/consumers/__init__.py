"""What an optimizer is about to consume, one small adapter per kind of optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

ALONE = object()


class Part(NamedTuple):
    """The gradient at the sampled coordinates, parameter after parameter, and which of them this rank holds.

    consumed: float64 [elements] on the host, zero where this rank holds none. held: bool [elements].
    """

    consumed: torch.Tensor
    held: torch.Tensor


class Consumer(Protocol):
    """Reads a model's gradients where its optimizer will read them.

    parameters: name -> the tensor at which each backward's gradient arrives. sizes: name -> elements of the whole
    parameter, the same on every rank. group: the process group that shares the work of a window (None is all ranks), or
    ALONE where this rank goes its own way.
    """

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def group(self) -> object: ...

    @property
    def steppers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The torch optimizers whose `step` consumes the gradient."""

    def read(self, optimizer: torch.optim.Optimizer, sample: Mapping[str, torch.Tensor]) -> Part | None:
        """What `optimizer`, one of the steppers, is about to consume; None while more calls of the window follow."""
