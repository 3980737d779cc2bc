"""Proof of TF-0601: with offloaded gradients, torchao's CPUOffloadOptimizer keeps the last micro-batch of a window.

torchao wants a device with streams. The proof gives its module streams that do nothing, and memory that is not pinned;
its hooks, queue and step are the installed ones.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..measure.coefficients import Coefficients, measure
from . import experiment

MODULE = "torchao.optim.cpu_offload"
MICRO_BATCHES, WINDOWS = 8, 2


def main(module: str = MODULE) -> None:
    write = experiment.only_json_to_stdout()
    torch.set_num_threads(1)
    try:
        worst = max(train(module, MICRO_BATCHES), key=lambda window: window.relative_error)
    except RuntimeError as error:
        if type(error).__name__ != "UnfixedBugError":
            raise
        raise SystemExit("trainfix stops this run before a gradient is lost; it does not repair it") from None
    versions = {name: importlib.metadata.version(name) for name in ("torchao", "torch")}
    judged_by = {"tolerance": 1e-6, "not_this_error": []}
    write(asdict(worst) | {"packages": versions, "status": experiment.status()} | judged_by)


def train(module: str, micro_batches: int, **options: Any) -> Iterator[Coefficients]:
    """Windows of a small model, each with a step at its end: what the optimizer on the host consumed."""
    model = network()
    optimizer = on_cpu(module)(model.parameters(), torch.optim.SGD, **{"offload_gradients": True, "lr": 0.1, **options})
    consumed: dict[int, torch.Tensor] = {}
    watch(optimizer, consumed)
    earlier = list[torch.Tensor]()
    for window in range(WINDOWS):
        rows = []
        for k in range(micro_batches):
            loss = loss_of(model, micro_batches * window + k) / micro_batches
            rows.append(flat(torch.autograd.grad(loss_of(model, micro_batches * window + k), list(model.parameters()))))
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        stacked = torch.stack(rows) / micro_batches
        yield measure(
            stacked,
            flat([consumed[place] for place in sorted(consumed)]),
            earlier=torch.cat(earlier) if earlier else None,
        )
        earlier.append(stacked)
        consumed.clear()


def network() -> torch.nn.Module:
    """Two layers, large enough for torchao to offload them."""
    torch.manual_seed(7)
    first, second = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
    return torch.nn.Sequential(first, torch.nn.Tanh(), second)


def loss_of(model: torch.nn.Module, number: int) -> torch.Tensor:
    """The loss of one micro-batch."""
    inputs, targets = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(number))
    return torch.nn.functional.mse_loss(model(inputs), targets)


def flat(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them, one after the other [elements], float64."""
    return torch.cat([one.reshape(-1).double() for one in gradients])


def watch(optimizer: Any, consumed: dict[int, torch.Tensor]) -> None:
    """Let what the optimizers on the host consume be noted in `consumed`: parameter's place -> gradient."""
    for place, own in enumerate(optimizer.optim_dict.values()):

        def note(stepping: Any, *_: Any, place: int = place) -> None:
            consumed[place] = stepping.param_groups[0]["params"][0].grad.clone()

        own.register_step_pre_hook(note)


def on_cpu(module: str) -> Any:
    """The installed CPUOffloadOptimizer, for a device that it takes for a GPU and that is the CPU."""
    offload: Any = importlib.import_module(module)
    offload.get_available_devices = lambda: ["cuda"]
    offload.torch = _TorchWithStreams()
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None
    return offload.CPUOffloadOptimizer


class _Stream:
    """A stream on which everything has happened already."""

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _Stream:
        return self


class _TorchWithStreams:
    """torch as the installed module sees it: with `torch.cuda` streams, and without pinned memory."""

    class cuda:
        Stream = _Stream
        current_stream = staticmethod(_Stream)
        stream = staticmethod(lambda stream: contextlib.nullcontext())

    @staticmethod
    def empty_like(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.empty_like(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
