"""The experiment that the proofs share: a few windows of a small model under DeepSpeed, in one CPU process or two.

Runs only in a child interpreter (see `trainfix.proofs.prove`). It uses DeepSpeed's public API, torch's own AdamW and no
compiled op. The consumed gradient is what the torch optimizer sees when its step begins; the reference is plain
autograd at the same weights, summed in float64. One JSON object goes to stdout, everything else that is printed to
stderr.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ..measure.coefficients import Coefficients, measure

MICRO_BATCHES = 8
WINDOWS = 2

Loss = Callable[[int], torch.Tensor]
"""The loss of the k-th micro-batch of the current window, computed through the engine."""

Drive = Callable[[Any, Loss], None]
"""Runs one window of an engine: all its `backward` and `step` calls."""


@dataclass(frozen=True)
class Experiment:
    """What one proof asks for.

    config: merged into the base configuration of DeepSpeed, key by key.
    dtype: of the model, ``fp32`` or ``bf16``. A bf16 model is compared with plain autograd in bf16, so that only what
    happens to the gradients after `backward` is seen.
    mask: "0110..." uses a side branch of the model in the second and third micro-batch only.
    not_this_error: "0001" stands for coefficients that are not all 1 and yet not what the advisory speaks of.
    tolerance: the relative error that counts as right: what the reduction between `ranks` rounds away in bf16, say.
    """

    config: Mapping[str, Any]
    ranks: int = 1
    dtype: str = "fp32"
    micro_batches: int = MICRO_BATCHES
    mask: str = ""
    not_this_error: str = ""
    tolerance: float = 1e-6

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def reference_dtype(self) -> torch.dtype:
        return {"fp32": torch.float64, "bf16": torch.bfloat16}[self.dtype]


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
        _let_stage_3_do_without_streams()
    # Not the attribute `deepspeed.comm.torch`, which is torch itself. The op is a speed-up that takes long to build.
    communication: Any = sys.modules["deepspeed.comm.torch"]
    if hasattr(communication, "build_shm_op"):
        communication.build_shm_op = lambda *_, **__: None


def _let_stage_3_do_without_streams() -> None:
    """0.14.0 has no streams on CPU and waits for them all the same; later releases do not wait."""
    stage3: Any = importlib.import_module("deepspeed.runtime.zero.stage3")
    no_stream = SimpleNamespace(synchronize=lambda: None)
    sys.modules["deepspeed"].get_accelerator().current_stream = lambda: no_stream
    always = property(lambda optimizer: no_stream, lambda optimizer, stream: None)
    stage3.DeepSpeedZeroOptimizer_Stage3.reduce_and_partition_stream = always


def run(drive: Drive, **asked: Any) -> None:
    """Run an `Experiment` and print its JSON object: the coefficients of the worst window, and the package versions.

    `drive` decides how a window is run; the keyword arguments are those of `Experiment`.
    """
    experiment = Experiment(**asked)
    with_json = only_json_to_stdout()
    with all_ranks(experiment.ranks) as (rank, store):
        prepare_cpu()
        import deepspeed

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(experiment.ranks))
        os.environ.update(LOCAL_SIZE=str(experiment.ranks))
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=experiment.ranks)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        windows = list(_windows(deepspeed, experiment, drive))
        worst = max(windows, key=lambda window: window.relative_error)
        result = asdict(worst) | {"packages": {"deepspeed": deepspeed.__version__, "torch": torch.__version__}}
        if rank == 0:
            judged_by = {"tolerance": experiment.tolerance, "not_this_error": list(map(int, experiment.not_this_error))}
            with_json(result | judged_by | {"status": status()})
        torch.distributed.barrier()


@contextlib.contextmanager
def all_ranks(ranks: int) -> Iterator[tuple[int, Any]]:
    """(rank, the store through which the ranks meet). The block runs once on each rank, in processes forked from this
    one, which end with it; only the first goes on."""
    if ranks == 1:
        yield 0, torch.distributed.HashStore()  # type: ignore[attr-defined]
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        others = []
        for rank in range(1, ranks):
            process = os.fork()
            if not process:
                code = 1
                try:
                    yield rank, torch.distributed.FileStore(store, ranks)  # type: ignore[attr-defined]
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            others.append(process)
        try:
            yield 0, torch.distributed.FileStore(store, ranks)  # type: ignore[attr-defined]
        except BaseException:
            for process in others:
                os.kill(process, signal.SIGKILL)
            raise
        finally:
            for process in others:
                os.waitpid(process, 0)


def _windows(deepspeed: ModuleType, experiment: Experiment, drive: Drive) -> Iterator[Coefficients]:
    """The measurement of every window; the micro-batches of the earlier ones are given to it as well."""
    model = _Model(experiment).to(experiment.torch_dtype)
    reference = _Model(experiment).to(experiment.reference_dtype)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    consumed: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda stepping, *_: consumed.append(gradient(stepping, weights)))
    # 0.18 with two ranks on CPU: all_gather dies with "Output 0 of Split is a view" unless grad is off.
    with torch.set_grad_enabled(not deepspeed.__version__.startswith("0.18.")):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(experiment))
    rank, earlier = torch.distributed.get_rank(), list[torch.Tensor]()
    for window in range(WINDOWS):
        for place, parameter in enumerate(model.parameters()):
            with deepspeed.zero.GatheredParameters(parameter):  # of stage 3, one at a time; else it is whole anyway
                weights[place] = parameter.detach().clone()
        with torch.no_grad():
            for own, weight in zip(reference.parameters(), weights, strict=True):
                own.copy_(weight)
        rows = torch.stack([_reference(reference, experiment, window, k) for k in range(experiment.micro_batches)])
        drive(engine, lambda k, window=window: _loss(engine, model, experiment, window, k, rank))  # type: ignore[misc]
        if len(consumed) != window + 1:
            raise RuntimeError(f"expected {window + 1} optimizer steps after window {window + 1}, saw {len(consumed)}")
        yield measure(rows, consumed[-1], earlier=torch.cat(earlier) if earlier else None)
        earlier.append(rows)


class _Model(torch.nn.Module):
    """A small network; with a mask it has a side branch, whose use is switched on and off."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        torch.manual_seed(7)
        linear, tanh = torch.nn.Linear, torch.nn.Tanh
        self.layers = torch.nn.Sequential(linear(16, 48), tanh(), linear(48, 48), tanh(), linear(48, 1))
        self.use_side = bool(experiment.mask)
        if experiment.mask:
            self.side = linear(16, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(inputs)
        return output + self.side(inputs) if self.use_side else output


def _config(experiment: Experiment) -> dict[str, Any]:
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": experiment.micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"reduce_bucket_size": 10**6, "contiguous_gradients": True},
    }
    if experiment.dtype == "bf16":
        base["bf16"] = {"enabled": True}
    for key, value in experiment.config.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, Mapping) else value
    return base


def gradient(optimizer: Any, weights: list[torch.Tensor]) -> torch.Tensor:
    """What `optimizer` is about to consume [elements], float32, in the order of the model's parameters.

    With one parameter group DeepSpeed hands the optimizer one flat copy of all parameters, in their order and padded at
    the end, of which every rank holds its part. That is checked here against the weights, not assumed.
    """
    (flat,) = (parameter for group in optimizer.param_groups for parameter in group["params"])
    wanted = torch.cat([weight.reshape(-1) for weight in weights])
    found, gradient = (_whole(part.detach())[: wanted.numel()] for part in (flat, flat.grad))
    if not torch.equal(found.to(wanted.dtype), wanted):
        raise RuntimeError("the optimizer's flat weights are not the model's parameters in their order")
    return gradient.float()


def _whole(part: torch.Tensor) -> torch.Tensor:
    """All ranks' parts of a flat tensor, one after the other."""
    own = part.reshape(-1).clone()
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)


def _loss(caller: Any, model: Any, experiment: Experiment, window: int, k: int, rank: int) -> torch.Tensor:
    """The loss of micro-batch `k` on `rank`: of the output of `caller`, which is `model` or the engine around it."""
    generator = torch.Generator().manual_seed(1009 * window + k + 1_000_003 * rank)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(4, 16, generator=generator).to(dtype)
    targets = torch.randn(4, 1, generator=generator)
    if experiment.mask:
        model.use_side = experiment.mask[k] == "1"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.nn.functional.mse_loss(caller(inputs).to(wide), targets.to(wide))


def _reference(model: torch.nn.Module, experiment: Experiment, window: int, k: int) -> torch.Tensor:
    """What one micro-batch should add to the gradient [elements], float64: its mean over the ranks."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for rank in range(experiment.ranks):
        loss = _loss(model, model, experiment, window, k, rank) / experiment.micro_batches
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        total += torch.cat([(torch.zeros_like(own) if one is None else one).reshape(-1).double() for own, one in pairs])
    return total / experiment.ranks


def status() -> list[dict[str, Any]] | None:
    """trainfix.status() where trainfix was imported, else None."""
    trainfix: Any = sys.modules.get("trainfix")
    if trainfix is None:
        return None
    return [record if isinstance(record, dict) else asdict(record) for record in trainfix.status()]


def only_json_to_stdout() -> Callable[[dict[str, Any]], None]:
    """Send what others print to stderr, and return a function that prints JSON to the real stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    return write
