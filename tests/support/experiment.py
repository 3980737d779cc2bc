"""Run many configurations of one real DeepSpeed release in one child process, and say what its optimizer consumed.

From a test: ``run(release_folder, [{"stage": 2, "ga": 8}], trainfix=False)``. By hand, with the release's folder, src
and the project's root on PYTHONPATH: ``echo '[{"ga": 8}]' | python -m tests.support.experiment`` prints one JSON line
per configuration.

How it measures, and what it does not rely on:
- The consumed gradient is what the torch optimizer sees when its `step` begins (a step pre-hook of torch). ZeRO has
  divided it by the loss scale by then, so nothing is left to undo but clipping, which is one factor that follows from
  the engine's own norm. Every group's flat partition is gathered from all ranks; a parameter's place in it is where its
  storage lies in the group's flat buffer. (`grad_position` would say the same, but exists with offload only.)
- The reference is plain autograd in float64 at the same weights, averaged over the ranks, each window on its own.
- ``captured`` is a second reference: the micro-batch gradients as they arrive on the owning rank after the reduction.
  What low precision did before anyone accumulated is in them already, so the error against their sum is the
  accumulation's own. In stage 1 one sum arrives per window, so there it has no coefficients.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import importlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from tests.support import layouts

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One run. `driver` is who decides when a window ends:

    every: `backward` and `step` for each micro-batch (OpenRLHF, accelerate up to 1.7)
    boundary: the boundary is set by hand and `step` is called only there (accelerate since 1.8)
    accelerate: the engine's GA is 1, several `backward`, boundary set by hand, one `step` (TF-0003)
    bare: the same without setting the boundary

    `backward` is what it calls, and who divides the loss by the accumulation steps; "unscaled,engine" is both in turn:

    engine: `engine.backward(loss)`, which divides
    unscaled: `engine.backward(loss, scale_wrt_gas=False)`, having divided (transformers' Trainer, through accelerate)
    torch: `loss.backward()`, which divides from 0.18.3 on (not in stage 0, and fp16 has a scale to add)

    `cpu_adam`: DeepSpeed's compiled optimizer in torch's place. `engine_steps`: the engine's own accumulation steps
    where they are not the window's. `extra` is merged into DeepSpeed's configuration, section by section.
    `loss_scale` (fp16 only): 0 is dynamic, starting at 2**initial_scale_power. `mask`: '0110' uses a side branch in the
    second and third micro-batch only; a longer one goes on in the next windows. `side`: 0, or the width of a hidden
    layer in it. `overflow_window`: targets are 10**4 times as large there. `overlap`: None is the release's default.
    `tied`: two layers share their weight.
    """

    stage: int = 2
    offload: bool = True
    ga: int = 4
    dtype: str = "fp32"
    driver: str = "every"
    backward: str = "engine"
    windows: int = 3
    loss_scale: float = 64.0
    initial_scale_power: int = 12
    overflow_window: int | None = None
    overlap: bool | None = None
    bucket: int = 100_000
    round_robin: bool = False
    frozen: bool = False
    groups: int = 1
    clip: float = 0.0
    checkpointing: str = ""
    mask: str = ""
    side: int = 0
    tied: bool = False
    lr: float = 1e-3
    cpu_adam: bool = False
    engine_steps: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = {
            "dtype": ("fp32", "bf16", "fp16", "autocast"),
            "driver": ("every", "boundary", "accelerate", "bare"),
            "checkpointing": ("", "reentrant", "nonreentrant"),
            "groups": (1, 2),
            "stage": (0, 1, 2, 3),
        }
        for key, valid in choices.items():
            if getattr(self, key) not in valid:
                raise ValueError(f"{key} must be one of {valid}, not {getattr(self, key)!r}")
        if not set(self.backward.split(",")) <= {"engine", "unscaled", "torch"}:
            raise ValueError(f"backward must be of engine, unscaled and torch, not {self.backward!r}")

    @property
    def engine_ga(self) -> int:
        if self.engine_steps is not None:
            return self.engine_steps
        return 1 if self.driver in ("accelerate", "bare") else self.ga


def run(
    release_folder: str | Path,
    configurations: Sequence[Mapping[str, Any]],
    *,
    trainfix: bool,
    ranks: int = 1,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    program: str = "tests.support.experiment",
) -> list[dict[str, Any]]:
    """One result per configuration, in order. What goes wrong is a value: `error` is a text then, else None.

    `trainfix` says whether the child begins with ``import trainfix``; without it trainfix is never imported. `env` is
    added to the child's environment. `program` is the module that the child runs: one that calls `main`.
    A configuration that kills its child costs only itself: the others go on in a fresh one. When the release does not
    start at all, or `timeout` seconds are over, all that is missing gets that error.
    """
    environment = _environment(release_folder, trainfix, env)
    end = time.monotonic() + timeout
    results: list[dict[str, Any]] = []
    while len(results) < len(configurations):
        with tempfile.TemporaryDirectory() as folder:
            wanted = Path(folder, "configurations.json")
            wanted.write_text(json.dumps([dict(configuration) for configuration in configurations[len(results) :]]))
            lines, problem = _run_children(program, wanted, environment, trainfix, ranks, end)
        results += lines[1:]
        if problem is None or (len(lines) > 1 and lines[-1]["error"]):
            continue
        hopeless = not lines or time.monotonic() > end
        lost = configurations[len(results) :] if hopeless else configurations[len(results) :][:1]
        results += [{"configuration": dict(c), "error": problem, "windows": []} for c in lost]
    return results


def _environment(release_folder: str | Path, trainfix: bool, extra: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRAINFIX")}
    return inherited | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(release_folder).resolve()), str(SOURCE), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "TRAINFIX": "on" if trainfix else "off",
        **(extra or {}),
    }


def _run_children(
    program: str, wanted: Path, environment: dict[str, str], trainfix: bool, ranks: int, end: float
) -> tuple[list[dict[str, Any]], str | None]:
    """The lines that the first rank wrote (the first says that it started), and why some may be missing."""
    command = [sys.executable, "-m", program, str(wanted)] + (["--trainfix"] if trainfix else [])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment | {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    children, logs = [], []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        logs.append((wanted.with_name(f"out{rank}").open("w+"), wanted.with_name(f"err{rank}").open("w+")))
        out, err = logs[-1]
        children.append(subprocess.Popen(command, env=shared | place, stdout=out, stderr=err, cwd=wanted.parent))
    problem = _wait(children, end)
    errors = [err.seek(0) or err.read() for _, err in logs]
    logs[0][0].seek(0)
    lines = [json.loads(line) for line in logs[0][0].read().splitlines() if line.endswith("}")]
    for out, err in logs:
        out.close()
        err.close()
    failed = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode]
    if problem is None and failed:
        tails = "; ".join(f"rank {rank} ended with {code}: {errors[rank].strip()[-600:]}" for rank, code in failed)
        problem = f"the child died: {tails}"
    return lines, problem


def _wait(children: Sequence[subprocess.Popen[bytes]], end: float) -> str | None:
    """Wait for all; when one fails, give the others ten seconds. Why it was cut short, or None."""
    reason: str | None = None
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.returncode for child in children):
            failed_at = time.monotonic()
            end = min(end, failed_at + 10)
        if time.monotonic() > end:
            if failed_at is None:
                reason = "not finished within the timeout"
            for child in children:
                if child.returncode is None:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
            break
        time.sleep(0.05)
    return reason


# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.


Perform = Callable[[ModuleType, Mapping[str, Any], dict[str, Any]], None]
"""Runs one configuration on DeepSpeed and writes into the result what it found. May raise: `error` will say it."""


def main(perform: Perform | None = None) -> None:
    """The child's program. `perform` is what another program does with each entry of its list; default: `windows`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="JSON list of configurations; default: standard input")
    parser.add_argument("--trainfix", action="store_true", help="begin with `import trainfix`")
    arguments = parser.parse_args()
    text = Path(arguments.file).read_text() if arguments.file else sys.stdin.read()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if arguments.trainfix:
        importlib.import_module("trainfix")
    untouched = ModuleType("untouched")  # trainfix's own modules under another name, without its activating __init__
    untouched.__path__ = [str(SOURCE / "trainfix")]
    sys.modules["untouched"] = untouched
    deepspeed = _start()
    _answer(deepspeed, {"started": True}, out)
    in_step = True
    for number, values in enumerate(json.loads(text)):
        result = _result(deepspeed, values, perform or windows)
        in_step = _share_error(deepspeed, number, result)
        _answer(deepspeed, result, out)
        if not in_step:
            break
    out.close()
    sys.stderr.flush()
    # Not sys.exit: with two ranks, tearing gloo down can abort a process that has already answered.
    os._exit(0 if in_step else 3)


def _answer(deepspeed: ModuleType, value: dict[str, Any], out: IO[str]) -> None:
    if deepspeed.comm.get_rank() == 0:
        print(json.dumps(value), file=out, flush=True)


def _share_error(deepspeed: ModuleType, number: int, result: dict[str, Any]) -> bool:
    """Note another rank's error in `result`. False when the ranks ended differently: they are out of step then."""
    from torch.distributed.distributed_c10d import _get_default_store

    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    store = _get_default_store()
    keys = [f"experiment/{number}/{other}" for other in range(ranks)]
    store.set(keys[rank], result["error"] or "")
    try:
        store.wait(keys, timedelta(seconds=20))
    except RuntimeError:  # a rank hangs, most likely because it waits for this one
        result["error"] = result["error"] or "another rank did not finish"
        return False
    errors = [store.get(key).decode() for key in keys]
    others = [f"rank {other}: {error}" for other, error in enumerate(errors) if error]
    result["error"] = result["error"] or "; ".join(others) or None
    return all(errors) or not any(errors)


def _start() -> ModuleType:
    """Import DeepSpeed on CPU, whatever the release needs for that, and join the process group."""
    import numpy
    import torch
    import torch.distributed.elastic.agent.server.api as agent

    torch.set_num_threads(1)
    # 0.14.0 to 0.14.3 import names that today's torch and numpy have dropped, and that this experiment does not use.
    for module, name in ((agent, "log"), (agent, "_get_socket_with_port"), (numpy, "BUFSIZE")):
        if not hasattr(module, name):
            setattr(module, name, None)
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    importlib.import_module("untouched.proofs.experiment").prepare_cpu()
    deepspeed = importlib.import_module("deepspeed")
    accelerator = type(deepspeed.get_accelerator())
    if not deepspeed.get_accelerator().is_fp16_supported():  # up to 0.16.x CPU refuses fp16, though torch can do it
        accelerator.is_fp16_supported = lambda self: True
        dtypes = accelerator.supported_dtypes
        accelerator.supported_dtypes = lambda self: [*dtypes(self), torch.float16]
    if os.environ["WORLD_SIZE"] == "1":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=timedelta(seconds=60))
    gc.freeze()  # DeepSpeed collects garbage at every turn; what is imported by now need not be walked each time
    return deepspeed


def windows(deepspeed: ModuleType, values: Mapping[str, Any], result: dict[str, Any]) -> None:
    """Run all windows of the configuration that `values` describes."""
    trial = Trial(deepspeed, Configuration(**values))
    result["windows"].extend(trial.window() for _ in range(trial.configuration.windows))
    result["parameters"] = trial.parameters()


def _result(deepspeed: ModuleType, values: Mapping[str, Any], perform: Perform) -> dict[str, Any]:
    begin = time.perf_counter()
    result: dict[str, Any] = {"configuration": dict(values), "release": deepspeed.__version__, "error": None}
    result["windows"] = []
    try:
        perform(deepspeed, values, result)
    except Exception as error:  # any failure of the release is a result here
        result["error"] = f"{type(error).__name__}: {error}"
    if "trainfix" in sys.modules:
        result["status"] = _records(sys.modules["trainfix"])
    gc.collect()  # engines and their hooks form cycles
    result["seconds"] = round(time.perf_counter() - begin, 3)
    return result


def _records(trainfix: Any) -> list[dict[str, Any]]:
    return [record if isinstance(record, dict) else dataclasses.asdict(record) for record in trainfix.status()]


class Trial:
    """One engine, its float64 twin, and what they did so far. Call `window` once per window."""

    def __init__(self, deepspeed: ModuleType, configuration: Configuration, model: Any = None) -> None:
        import torch

        self.configuration = configuration
        self.deepspeed = deepspeed
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(configuration.dtype, torch.float32)
        self.model = build_model(configuration).to(self.dtype) if model is None else model
        self.twin = build_model(dataclasses.replace(configuration, checkpointing="")).double()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Stage 3 leaves parameters empty, also those of a model that another engine had.
        self.sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.trained]
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        pairs = zip(names, self.sizes, strict=True)
        self.side = [name.startswith("side.") for name, size in pairs for _ in range(size)]
        self.done = 0
        self.rows: list[torch.Tensor] = []
        groups = parameter_groups(self.model, configuration)
        compiled = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam if configuration.cpu_adam else None
        optimizer = (compiled or torch.optim.AdamW)(groups, lr=configuration.lr, weight_decay=0.0)
        # 0.18.x with two ranks on CPU: all_gather dies with "Output 0 of Split is a view" unless grad is off.
        with torch.set_grad_enabled(not deepspeed.__version__.startswith("0.18.")):
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=deepspeed_config(configuration)
            )
        self.layout = layouts.of(self.zero, self.trained)
        optimizer.register_step_pre_hook(lambda stepping, *_: self.layout.see(stepping))  # some step while being built
        self.arrived: torch.Tensor = torch.zeros(0)
        self.current = 0
        self.layout.watch(self._arrive)

    def window(self) -> dict[str, Any]:
        """Run one window and report on it."""
        import torch

        number, count = self.done, self.configuration.ga
        self.done += 1
        with layouts.full_weights(list(self.model.parameters())):
            self.twin.load_state_dict(self.model.state_dict())
        rows = torch.stack([self._reference(number, k) for k in range(count)])
        elements = rows.shape[1]
        self.layout.seen = {}
        self.arrived = torch.zeros(count, elements, dtype=torch.float64)
        scale, safe = 1.0, None
        for k in range(count):
            last = k == count - 1
            self.current = k
            self._backward(number, k)
            if last:
                scale = float(getattr(self.zero, "loss_scale", 1.0) or 1.0)
                safe = self._safe_norm()
            if last or self.configuration.driver == "every":
                self.engine.step()
        report = self._report(rows, scale, safe)
        self.rows.append(rows)
        return report

    def parameters(self) -> str:
        """sha256 of the model's parameters as they are now."""
        with layouts.full_weights(list(self.model.parameters())):
            return sha256(parameter.detach() for parameter in self.model.parameters())

    def _backward(self, number: int, k: int) -> None:
        engine, configuration = self.engine, self.configuration
        if configuration.driver in ("boundary", "accelerate"):
            engine.set_gradient_accumulation_boundary(k == configuration.ga - 1)
        loss = self._loss(engine, number, k, self.deepspeed.comm.get_rank())
        calls = configuration.backward.split(",")
        call = calls[k % len(calls)]
        if call == "unscaled":
            engine.backward(loss / configuration.ga, scale_wrt_gas=False)
        elif call == "torch":
            (loss / (configuration.ga / configuration.engine_ga)).backward()
        else:
            engine.backward(loss / (configuration.ga / configuration.engine_ga))

    def _loss(self, model: Any, number: int, k: int, rank: int) -> torch.Tensor:
        import torch

        configuration = self.configuration
        twin = model is self.twin
        inputs, targets = batch(configuration, number, k, rank)
        inputs, targets = inputs.to(self.dtype), targets.to(self.dtype)
        if twin:
            inputs, targets = inputs.double(), targets.double()
        if configuration.mask:
            place = (number * configuration.ga + k) % len(configuration.mask)
            (self.twin if twin else self.model).use_side = configuration.mask[place] == "1"
        outer = contextlib.nullcontext()
        if configuration.dtype == "autocast" and not twin and not hasattr(model, "torch_autocast_enabled"):
            outer = torch.autocast("cpu", dtype=torch.bfloat16)  # before DeepSpeed did it by itself
        with outer:
            output = model(inputs)
        wide = torch.float64 if twin else torch.float32
        return torch.nn.functional.mse_loss(output.to(wide), targets.to(wide))

    def _reference(self, number: int, k: int) -> torch.Tensor:
        """What micro-batch k should add to the gradient [elements], float64: its mean over the ranks, divided by GA."""
        import torch

        parameters = [parameter for parameter in self.twin.parameters() if parameter.requires_grad]
        ranks = self.deepspeed.comm.get_world_size()
        total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
        for rank in range(ranks):
            loss = self._loss(self.twin, number, k, rank)
            total += torch.cat(
                [
                    (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
                    for parameter, gradient in zip(
                        parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
                    )
                ]
            )
        return total / ranks / self.configuration.ga

    def _arrive(self, index: int, start: int, gradient: torch.Tensor) -> None:
        """Add a piece of the reduced gradient of a trained parameter to the row of the current micro-batch."""
        before = sum(self.sizes[:index]) + start
        self.arrived[self.current][before : before + gradient.numel()] += gradient.detach().reshape(-1).double()

    def _safe_norm(self) -> float | None:
        """|safe_get_full_grad| over all parameters, as it stands before the step (fp16: with the loss scale in it).

        None with round_robin_gradients on several ranks: there the call itself fails in DeepSpeed, on one rank. None
        with BF16_Optimizer: up to 0.19.7 the call finds in `.grad` what autograd left, this rank's last micro-batch.
        """
        import torch

        if self.configuration.round_robin and self.deepspeed.comm.get_world_size() > 1:
            return None
        if isinstance(self.layout, layouts.Bf16Partitioned):
            return None

        utils = importlib.import_module("deepspeed.utils")
        gradients = [utils.safe_get_full_grad(parameter) for parameter in self.trained]
        return float(torch.cat([g.detach().double().reshape(-1) for g in gradients if g is not None]).norm())

    def _report(self, rows: torch.Tensor, scale: float, safe: float | None) -> dict[str, Any]:
        import torch

        torch.distributed.all_reduce(self.arrived)
        report: dict[str, Any] = {"skipped": not self.layout.seen, "loss_scale": scale}
        if not self.layout.seen:
            return report
        measure = importlib.import_module("untouched.measure.coefficients").measure
        consumed = self.layout.consumed()
        norm = self.engine.get_global_grad_norm()  # None in stage 0 with fp32
        norm = None if norm is None else float(norm)
        clip = self.configuration.clip
        undone = consumed.double() * (max(1.0, (norm + 1e-6) / clip) if clip and norm is not None else 1.0)
        found = measure(rows, undone, earlier=torch.cat(self.rows) if self.rows else None)
        want = float(rows.sum(0).norm()) or 1.0
        if self.configuration.mask:
            earlier = torch.cat(self.rows)[:, self.side] if self.rows else None
            side = measure(rows[:, self.side], undone[self.side], earlier=earlier)
            report["side"] = {"coefficients": list(side.current), "earlier": list(side.earlier)}
            report["side"] |= {"relative_error": side.relative_error, "norm_ratio": side.norm_ratio}
        report |= {
            "coefficients": list(found.current),
            "earlier": list(found.earlier),
            "relative_error": found.relative_error,
            "cosine": found.cosine,
            "norm_ratio": found.norm_ratio,
            "residual": found.residual,
            "global_norm_ratio": None if norm is None else norm / want,
            "safe_norm_ratio": None if safe is None else safe / scale / want,
            "consumed_norm": float(consumed.double().norm()),
            "sha256": sha256([consumed]),
            "captured": self._captured(undone, scale),
        }
        return report

    def _captured(self, undone: torch.Tensor, scale: float) -> dict[str, Any]:
        """The same, against the gradients as they arrived."""
        measure = importlib.import_module("untouched.measure.coefficients").measure
        found = measure(self.arrived / scale, undone)
        single = self.configuration.stage == 1 and not isinstance(self.layout, layouts.Bf16Partitioned)
        return {"coefficients": None if single else list(found.current), "relative_error": found.relative_error}


def build_model(configuration: Configuration) -> Any:
    """A small network of odd sizes (3407 elements without the side branch), so that parameters straddle partitions."""
    import torch
    from torch.utils.checkpoint import checkpoint

    linear, tanh = torch.nn.Linear, torch.nn.Tanh

    class Network(torch.nn.Module):
        use_side = True

        def __init__(self) -> None:
            super().__init__()
            self.first = linear(12, 37)
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(linear(37, 37), tanh()) for _ in range(2))
            self.last = linear(37, 3)
            if configuration.mask:
                wide = configuration.side
                self.side = torch.nn.Sequential(linear(12, wide), linear(wide, 37)) if wide else linear(12, 37)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = self.first(inputs)
            if configuration.mask and self.use_side:
                hidden = hidden + self.side(inputs)
            hidden = torch.tanh(hidden)
            for block in self.blocks:
                if configuration.checkpointing:
                    hidden = checkpoint(block, hidden, use_reentrant=configuration.checkpointing == "reentrant")
                else:
                    hidden = block(hidden)
            return self.last(hidden)

    torch.manual_seed(7)
    model = Network()
    if configuration.tied:
        model.blocks[1][0].weight = model.blocks[0][0].weight
    if configuration.frozen:
        (model.first.bias if configuration.tied else model.blocks[0][0].weight).requires_grad_(False)
    return model


def parameter_groups(model: Any, configuration: Configuration) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if configuration.groups == 1:
        return [{"params": trained}]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    return [{"params": matrices}, {"params": vectors, "lr": configuration.lr / 2}]


def batch(configuration: Configuration, number: int, k: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1_000_003 * number + 1009 * k + rank + 1)
    inputs, targets = torch.randn(4, 12, generator=generator), torch.randn(4, 3, generator=generator)
    return inputs, targets * (1e4 if number == configuration.overflow_window else 1.0)


def deepspeed_config(configuration: Configuration) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": configuration.stage,
        "reduce_bucket_size": configuration.bucket,
        "round_robin_gradients": configuration.round_robin,
        "contiguous_gradients": True,
    }
    if configuration.stage == 3:  # small, so that parameters are scattered and lie in several sub-groups
        zero |= {"stage3_param_persistence_threshold": 8, "sub_group_size": 1500}
        zero |= {"stage3_prefetch_bucket_size": 0}  # up to 0.15.2 what is prefetched and not used stops it
    if configuration.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if configuration.overlap is not None:
        zero["overlap_comm"] = configuration.overlap
    scale = {"loss_scale": configuration.loss_scale, "initial_scale_power": configuration.initial_scale_power}
    precision = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        "fp16": {"fp16": {"enabled": True, "loss_scale_window": 2, "hysteresis": 1, **scale}},
        "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    }[configuration.dtype]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": configuration.engine_ga,
        "gradient_clipping": configuration.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **precision,
    }
    for section, values in configuration.extra.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
    return config


def sha256(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> str:
    """Of the raw bytes, whatever the type."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
