"""Training with real DeepSpeed: tokens per second with trainfix, against the broken release and upstream's repair.

    PYTHONPATH=src:. python benchmarks/gpu/end_to_end.py --release 0.18.9=DIR --release 0.19.8=DIR [STEP...]

DIR holds that release's `deepspeed` package (pip install --no-deps --target DIR deepspeed==VERSION, DS_BUILD_OPS=0).
The oldest of the releases given is the broken one, the newest is upstream's repair.

Every variant is a process of its own with its own engine, and all of them live at once: a window is run by each in
turn, so that a turn's times can be compared. Where the host's memory does not hold all, they come in groups, each with
the broken release in it. A Llama-style model with random weights, bf16, ZeRO-2, pinned CPU offload, torch's fused AdamW
on the host (it needs no compiler), micro-batches of 4096 tokens. `no offload` keeps the optimizer on the GPU; `ideal`
is the broken release with every copy left out, so its losses mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import common
from benchmarks.gpu.common import ROOT, Place, Row, Step
from benchmarks.gpu.models import MODELS, Llama, Sizes, elements
from benchmarks.gpu.ratios import ratio

TOKENS = 4096
WARM, TURNS, FEWEST_TURNS = 3, 8, 3
LIMIT = 100  # seconds: no turn begins after that, once there are the fewest
BUCKET = 500_000_000


class Variant(NamedTuple):
    """release: the folder's version. tier: with trainfix. mode: offload, none or ideal."""

    release: str
    tier: str | None = None
    mode: str = "offload"


def variants(broken: str, repaired: str | None) -> dict[str, Variant]:
    """Name -> variant; the first is what the others are grouped with."""
    return {
        "broken": Variant(broken),
        "trainfix, resident": Variant(broken, "resident"),
        "trainfix, ring": Variant(broken, "ring"),
        "trainfix, host-add": Variant(broken, "host-add"),
        "ideal": Variant(broken, mode="ideal"),
        **({"upstream": Variant(repaired)} if repaired else {}),
        "no offload": Variant(broken, mode="none"),
        "trainfix, torch": Variant(broken, "torch"),
    }


# The torch tier takes minutes; with many accumulation steps so does the host's addition. Of the larger models the host
# does not hold many processes at once.
MAIN = ("broken", "trainfix, resident", "trainfix, ring", "trainfix, host-add", "ideal", "upstream", "no offload")
FEW = ("broken", "trainfix, resident", "trainfix, ring", "upstream")


def host_bytes(count: int, spare: int = 4 << 30) -> int:
    """About what an offloading process takes on the host: masters and gradients (8 bytes per element), a 16-bit buffer
    and DeepSpeed's accumulator (4), rounding of these to powers of two (4), two moments (8), and Python and torch."""
    return count * (8 + 4 + 4 + 8) + spare


def device_bytes(sizes: Sizes, tokens: int) -> int:
    """About what a process takes on the device: weights, gradients and a bucket, the words' scores and their gradients
    in 16 and 32 bits, activations, the kernels."""
    scores = tokens * sizes.words * 16
    activations = sizes.blocks * tokens * (12 * sizes.hidden + 4 * sizes.inner) * 2
    return 6 * sum(elements(sizes)) + scores + activations + (2 << 30)


def groups(names: Sequence[str], room: int) -> list[list[str]]:
    """The first name in every group, the others once, in order, `room` together; two at least."""
    first, others, size = names[0], list(names[1:]), max(2, room) - 1
    return [[first, *others[begin : begin + size]] for begin in range(0, len(others), size)]


def available_memory() -> int:
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    return int(found.group(1)) * 1024 if found else 64 << 30


# ---------------------------------------------------------------------------------------------------------------------
# The parent


class Worker:
    """A variant's process. It answers one JSON line to each line that it is told."""

    def __init__(self, name: str, variant: Variant, folder: Path, settings: Row, log: Path) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRAINFIX")}
        environment = inherited | {
            "PYTHONPATH": os.pathsep.join([str(folder.resolve()), str(ROOT / "src"), str(ROOT)]),
            "TRAINFIX": "off" if variant.tier is None else "on",
            "TRAINFIX_GRADCOPY": variant.tier or "auto",
            **({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if settings["rehearsal"] else {}),
        }
        command = [sys.executable, __file__, "--worker", json.dumps({**settings, **variant._asdict()})]
        self.name, self._log = name, log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def answer(self) -> Row:
        """Raises RuntimeError with where the log is when the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {_tail(Path(self._log.name))}")
        found: Row = json.loads(line)
        return found

    def ask(self, word: str) -> Row:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def _tail(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").strip()[-1500:]


def measure(
    model: str, accumulation: int, place: Place, options: Namespace, only: Sequence[str] | None = None
) -> list[Row]:
    """The variants at one number of accumulation steps. Raises ValueError where no release is named."""
    releases = dict(one.split("=", 1) for one in options.release)
    order = sorted(releases, key=lambda version: [int(part) for part in version.split(".")])
    if not order:
        raise ValueError("name the releases' folders: --release 0.18.9=DIR --release 0.19.8=DIR")
    wanted = variants(order[0], order[-1] if len(order) > 1 else None)
    wanted = {name: variant for name, variant in wanted.items() if only is None or name in only}
    settings = {
        "model": "tiny" if place.rehearsal else model,
        "accumulation": accumulation,
        "tokens": place.scale(TOKENS, 64),
        "rehearsal": place.rehearsal,
    }
    folder = options.out or common.folder_of(place)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for number, names in enumerate(groups(list(wanted), _room(settings, place))):
        logs = {name: folder / f"{_slug(name)}.log" for name in names}
        members = {name: (wanted[name], Path(releases[wanted[name].release]), logs[name]) for name in names}
        rows.extend({**row, "group": number} for row in _group(members, settings, place))
        for log in logs.values():
            log.unlink(missing_ok=True)
    if all("problem" in row for row in rows):
        raise RuntimeError("; ".join(f"{row['variant']}: {row['problem']}" for row in rows))
    _compare_with_truth(rows)
    return [{"model": model, "accumulation": accumulation, **row} for row in rows]


def _room(settings: Row, place: Place) -> int:
    """How many processes the host and the device hold at once."""
    sizes = MODELS[settings["model"]]
    on_host = int(0.85 * available_memory()) // host_bytes(sum(elements(sizes)), place.scale(4 << 30, 1 << 29))
    if place.rehearsal:
        return on_host
    return min(on_host, int(0.95 * torch.cuda.mem_get_info()[0]) // device_bytes(sizes, settings["tokens"]))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name)


def _group(members: dict[str, tuple[Variant, Path, Path]], settings: Row, place: Place) -> list[Row]:
    """One window each in turn. A variant that fails is a row with its problem; the others go on."""
    workers, rows, problems = dict[str, Worker](), dict[str, Row](), list[Row]()
    windows: dict[str, list[Row]] = {name: [] for name in members}

    def told(name: str, word: str | None) -> Row | None:
        try:
            return workers[name].answer() if word is None else workers[name].ask(word)
        except RuntimeError as problem:
            problems.append({"variant": name, "problem": str(problem)})
            workers.pop(name).stop()
            return None

    try:
        for name, (variant, folder, log) in members.items():
            workers[name] = Worker(name, variant, folder, settings, log)
        for name in list(workers):
            if (about := told(name, None)) is not None:
                rows[name] = {"variant": name, **about}
        fewest, most = (1, 1) if place.rehearsal else (FEWEST_TURNS, TURNS)
        begin = time.monotonic()
        for turn in range(WARM + most):
            if turn >= WARM + fewest and time.monotonic() - begin > LIMIT:
                break
            for name in list(workers):
                found = told(name, "window")
                if found is not None:
                    windows[name].append({**found, "warm": turn < WARM})
        for name in list(workers):
            if (end := told(name, "end")) is not None:
                rows[name] |= end
    finally:
        for worker in workers.values():
            worker.stop()
    alive = [name for name in workers if name in rows]
    return [*_rows(alive, rows, windows, settings), *problems]


def _rows(alive: Sequence[str], rows: dict[str, Row], windows: dict[str, list[Row]], settings: Row) -> Iterator[Row]:
    timed = {name: [one for one in windows[name] if not one["warm"]] for name in alive}
    for name in alive:
        whole = [one["seconds"] for one in timed[name]]
        middle = sorted(whole)[len(whole) // 2]
        row = {
            **rows[name],
            "window_seconds": whole,
            "tokens_per_second": settings["accumulation"] * settings["tokens"] / middle,
            **{part: _median([one[part] for one in timed[name]]) for part in ("forward", "backward", "step")},
            "losses": [one["loss"] for one in windows[name]],
            "norms": [one["norm"] for one in windows[name]],
        }
        for other in alive:  # tokens per second of this one / of the other: the other's time / this one's
            if other in ("broken", "upstream", "ideal", "no offload") and other != name:
                row[f"speed_over_{_slug(other)}"] = ratio([one["seconds"] for one in timed[other]], whole)._asdict()
        yield row


def _compare_with_truth(rows: Sequence[Row]) -> None:
    """How far losses and norms are from those of the run without offload: every run has the same weights and words."""
    truth = next((row for row in rows if row["variant"] == "no offload" and "losses" in row), None)
    for row in rows:
        if truth is not None and row is not truth and "losses" in row:
            for what, key in (("loss", "losses"), ("norm", "norms")):
                if None not in row[key] + truth[key]:
                    row[f"{what}_error"] = _largest_error(row[key], truth[key])


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _largest_error(ours: Sequence[float], truth: Sequence[float]) -> float:
    """The largest relative difference of the same window; infinite where one is not a number."""
    errors = [abs(mine - right) / max(abs(right), 1e-12) for mine, right in zip(ours, truth, strict=False)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


# ---------------------------------------------------------------------------------------------------------------------
# A worker


def configuration(settings: Row) -> Row:
    zero: Row = {
        "stage": 2,
        "reduce_bucket_size": 50_000 if settings["rehearsal"] else BUCKET,
        "contiguous_gradients": True,
        "overlap_comm": False,
    }
    if settings["mode"] != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings["accumulation"],
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class Trainer:
    """One engine, one window at a time."""

    def __init__(self, settings: Row) -> None:
        self.settings, self.place = settings, Place(rehearsal=settings["rehearsal"])
        if settings["tier"] is not None:
            importlib.import_module("trainfix")
        self.deepspeed = _deepspeed(rehearsal=settings["rehearsal"])
        torch.manual_seed(0)
        model = Llama(MODELS[settings["model"]]).to(self.place.device, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        # 0.18.x on one CPU: its all-gather wants no gradients to be recorded meanwhile.
        with torch.set_grad_enabled(not settings["rehearsal"]):
            self.engine, self.zero, *_ = self.deepspeed.initialize(
                model=model, optimizer=optimizer, config=configuration(settings)
            )
        if settings["mode"] == "ideal":
            _leave_out_copies(self.zero)
        self.done = 0

    def about(self) -> Row:
        trainfix = sys.modules.get("trainfix")
        applied = [record["id"] for record in _records(trainfix) if record["state"] == "applied"] if trainfix else []
        return {"deepspeed": self.deepspeed.__version__, "tier": self.settings["tier"], "repaired": applied}

    def window(self) -> Row:
        """Seconds of one window from an idle device to an idle device, and of its parts; the mean loss and the norm."""
        place, steps = self.place, self.settings["accumulation"]
        words = self._words()
        losses, forward, backward, step = [], [], [], 0.0
        place.synchronize()
        begin = time.perf_counter()
        for number in range(steps):
            marks = [place.mark()]
            loss = self.engine(words[number : number + 1])
            marks.append(place.mark())
            self.engine.backward(loss)
            marks.append(place.mark())
            losses.append(loss.detach())
            forward.append(marks[:2])
            backward.append(marks[1:])
            if number == steps - 1:
                before = time.perf_counter()
            self.engine.step()
        place.synchronize()
        end = time.perf_counter()
        step = end - before
        norm = self.engine.get_global_grad_norm()
        self.done += 1
        return {
            "seconds": end - begin,
            "forward": sum(place.between(*pair) for pair in forward),
            "backward": sum(place.between(*pair) for pair in backward),
            "step": step,
            "loss": float(torch.stack(losses).float().mean()),
            "norm": None if norm is None else float(norm),
        }

    def _words(self) -> torch.Tensor:
        """[accumulation steps, tokens], the same for every variant."""
        generator = torch.Generator().manual_seed(self.done)
        shape = (self.settings["accumulation"], self.settings["tokens"])
        return torch.randint(MODELS[self.settings["model"]].words, shape, generator=generator).to(self.place.device)

    def end(self) -> Row:
        """What the process has taken at most."""
        found: Row = {"carried_by": [], "device_peak_bytes": None, "device_reserved_bytes": None}
        trainfix = sys.modules.get("trainfix")
        if trainfix:
            found["carried_by"] = [str(record.get("reason")) for record in _records(trainfix) if record.get("reason")]
            carriers = sys.modules.get("trainfix.fixes.deepspeed.offload_accumulation.carriers")
            if carriers is not None:
                found["carried_by"] = list(carriers.notes())
        if not self.place.rehearsal:
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
            found["device_reserved_bytes"] = torch.cuda.max_memory_reserved()
            counts = getattr(torch.cuda, "host_memory_stats", dict)()
            found["pinned"] = {name: value for name, value in counts.items() if "bytes" in name}
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        kilobytes = re.findall(r"(VmHWM|VmLck|VmPin):\s*(\d+) kB", status)
        return found | {f"host_{name}_bytes": int(value) * 1024 for name, value in kilobytes}


def _records(trainfix: Any) -> list[Row]:
    return [
        one if isinstance(one, dict) else {"id": one.id, "state": one.state, "reason": one.reason}
        for one in trainfix.status()
    ]


def _deepspeed(*, rehearsal: bool) -> Any:
    """The release that comes first on the path, with a process group of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ.update({**single, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    backend = "gloo" if rehearsal else "nccl"
    if rehearsal:
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda *_, **__: None  # a speed-up of collectives that takes long to compile
    torch.distributed.init_process_group(backend, rank=0, world_size=1)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return deepspeed


def _leave_out_copies(zero: Any) -> None:
    """No gradient reaches the host, and none is looked at. The optimizer steps on zeros, which takes as long."""
    zero.copy_grads_in_partition = lambda parameter, *_: zero.clear_grad_attribute(parameter)
    zero.check_overflow = lambda *_, **__: setattr(zero, "overflow", False)
    zero.scaled_global_norm = lambda *_, **__: torch.tensor(1.0)


def work(settings: Row) -> None:
    """Answer on standard output: about the engine once it stands, then a window for each line, at last the end."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    trainer = Trainer(settings)
    gc.freeze()
    print(json.dumps(trainer.about()), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.window() if line.strip() == "window" else trainer.end()), file=out, flush=True)
    out.close()
    os._exit(0)  # tearing a process group down can abort a process that has already answered


STEPS = {
    "0.5B-ga8": Step(210, partial(measure, "0.5B", 8, only=MAIN)),
    "0.5B-ga1": Step(120, partial(measure, "0.5B", 1)),
    "0.5B-ga4": Step(160, partial(measure, "0.5B", 4, only=MAIN)),
    "0.5B-ga32": Step(280, partial(measure, "0.5B", 32, only=[name for name in MAIN if name != "trainfix, host-add"])),
    "1.5B-ga8": Step(330, partial(measure, "1.5B", 8, only=FEW)),
}


def parser() -> argparse.ArgumentParser:
    made = common.parser(str(__doc__), STEPS)
    made.add_argument("--release", action="append", default=[], metavar="VERSION=DIR", help="may be repeated")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return 0
    return common.main("end_to_end", "training with DeepSpeed, end to end", STEPS, options)


if __name__ == "__main__":
    sys.exit(main())
