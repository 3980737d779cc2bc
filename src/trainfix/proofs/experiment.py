"""The experiment that the proofs share: a few windows of a small model under ZeRO-2 with CPU offload, one CPU process.

Runs only in a child interpreter (see `trainfix.proofs.prove`). It uses DeepSpeed's public API, torch's own AdamW and no
compiled op. The consumed gradient is what the torch optimizer sees when its step begins; the reference is plain
autograd in float64 at the same weights. One JSON object goes to stdout, everything else that is printed to stderr.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

from ..measure.coefficients import Coefficients, measure

MICRO_BATCHES = 8
WINDOWS = 2

Loss = Callable[[int], torch.Tensor]
"""The loss of the k-th micro-batch of the current window, computed through the engine."""

Drive = Callable[[Any, Loss], None]
"""Runs one window of an engine: all its `backward` and `step` calls."""


def prepare_cpu() -> None:
    """Import DeepSpeed, any release since 0.14.0, on its CPU accelerator without needing a compiler or oneCCL."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    version = importlib.metadata.version("deepspeed")
    if version == "0.14.0":
        # This release imports Intel's packages on CPU, and uses neither of them with gloo.
        for name in ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"):
            if importlib.util.find_spec(name) is None:
                sys.modules[name] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    importlib.import_module("deepspeed.comm.torch")
    if version == "0.14.0":
        sys.modules["deepspeed"].get_accelerator()._communication_backend_name = "gloo"  # later releases choose it
    # Not the attribute `deepspeed.comm.torch`, which is torch itself. The op is a speed-up that takes long to build.
    communication: Any = sys.modules["deepspeed.comm.torch"]
    if hasattr(communication, "build_shm_op"):
        communication.build_shm_op = lambda *_, **__: None


def run(engine_steps: int, drive: Drive) -> None:
    """Run the experiment and print its JSON object: the coefficients of the worst window, and the package versions.

    `engine_steps` is the engine's own number of accumulation steps; `drive` decides how a window is run.
    """
    with_json = _only_json_to_stdout()
    prepare_cpu()
    import deepspeed
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    windows = list(_windows(deepspeed, engine_steps, drive))
    worst = max(windows, key=lambda window: window.relative_error)
    result = asdict(worst) | {"packages": {"deepspeed": deepspeed.__version__, "torch": torch.__version__}}
    with_json(result | {"status": _status()})


def _windows(deepspeed: ModuleType, engine_steps: int, drive: Drive) -> Iterator[Coefficients]:
    """The measurement of every window; the micro-batches of the earlier ones are given to it as well."""
    model = _model(torch.float32)
    reference = _model(torch.float64)
    layout = [parameter.detach().reshape(-1).clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    consumed: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda stepping, *_: consumed.append(_gradient(stepping, torch.cat(layout))))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(engine_steps))
    earlier: list[torch.Tensor] = []
    for window in range(WINDOWS):
        reference.load_state_dict(model.state_dict())
        layout[:] = [parameter.detach().reshape(-1).clone() for parameter in model.parameters()]
        rows = torch.stack([_reference(reference, window, k) for k in range(MICRO_BATCHES)])
        drive(engine, lambda k, window=window: _loss(engine, window, k))  # type: ignore[misc]
        if len(consumed) != window + 1:
            raise RuntimeError(f"expected {window + 1} optimizer steps after window {window + 1}, saw {len(consumed)}")
        yield measure(rows, consumed[-1], earlier=torch.cat(earlier) if earlier else None)
        earlier.append(rows)


def _model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(7)
    linear, tanh = torch.nn.Linear, torch.nn.Tanh
    return torch.nn.Sequential(linear(16, 48), tanh(), linear(48, 48), tanh(), linear(48, 1)).to(dtype)


def _config(engine_steps: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": engine_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 10**6,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
    }


def _gradient(optimizer: Any, weights: torch.Tensor) -> torch.Tensor:
    """What `optimizer` is about to consume [elements], in the order of the model's parameters.

    With one process and one parameter group, ZeRO hands the optimizer one flat copy of all parameters, in their order
    and padded at the end. That is checked here against the weights, not assumed.
    """
    (flat,) = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if not torch.equal(flat.detach().reshape(-1)[: weights.numel()], weights):
        raise RuntimeError("the optimizer's flat weights are not the model's parameters in their order")
    gradient: torch.Tensor = flat.grad.detach().reshape(-1)[: weights.numel()].clone()
    return gradient


def _loss(model: Any, window: int, micro_batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1009 * window + micro_batch)
    inputs = torch.randn(4, 16, generator=generator).to(dtype)
    targets = torch.randn(4, 1, generator=generator).to(dtype)
    return torch.nn.functional.mse_loss(model(inputs), targets)


def _reference(model: torch.nn.Module, window: int, micro_batch: int) -> torch.Tensor:
    """What one micro-batch should add to the gradient [elements], float64."""
    gradients = torch.autograd.grad(_loss(model, window, micro_batch, torch.float64), list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients]) / MICRO_BATCHES


def _status() -> list[dict[str, Any]] | None:
    """trainfix.status() where trainfix was imported, else None."""
    trainfix: Any = sys.modules.get("trainfix")
    if trainfix is None:
        return None
    return [record if isinstance(record, dict) else asdict(record) for record in trainfix.status()]


def _only_json_to_stdout() -> Callable[[dict[str, Any]], None]:
    """Send what others print to stderr, and return a function that prints JSON to the real stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    return write
