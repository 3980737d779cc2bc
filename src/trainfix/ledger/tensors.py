"""A run's tensors, hooks and objects: what this rank holds of a tensor, many small ones to the host at once, a hook
that cannot break what it is hooked to, and what is alive of a class."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_Kind = TypeVar("_Kind")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that is spread over ranks, densely; any other tensor itself."""
    held: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held.to_dense() if held.is_sparse else held


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """float64 copies [elements] of flat tensors, with one transfer for each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, one in enumerate(tensors):
        kinds.setdefault((one.device, one.dtype), []).append(number)
    found: dict[int, torch.Tensor] = {}
    for numbers in kinds.values():
        together = torch.cat([tensors[number].detach() for number in numbers]).to("cpu", torch.float64)
        found.update(zip(numbers, torch.split(together, [len(tensors[number]) for number in numbers]), strict=True))
    return [found[number] for number in range(len(tensors))]


def alive(*kinds: type[_Kind]) -> list[_Kind]:
    """The instances of these classes in this process. Asks for no attribute: some objects warn when they are asked."""
    return [one for one in gc.get_objects() if issubclass(type(one), kinds)] if kinds else []


def guarded(hook: Callable[..., object], failed: Callable[[Exception], object]) -> Callable[..., None]:
    """The hook, with an error of its own given to `failed` and not to the training."""

    def run(*args: Any, **named: Any) -> None:
        try:
            hook(*args, **named)
        except Exception as error:  # whatever it is, training is right without us
            failed(error)

    return run
