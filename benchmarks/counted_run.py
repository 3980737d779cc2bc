"""The child of benchmarks/counters.py: one real DeepSpeed run on the CPU accelerator, its copy path counted.

    PYTHONPATH=RELEASE:src:. python benchmarks/counted_run.py --accumulation 8 [--tier ring]    (prints one JSON line)

There is no device here, so memory is told apart by whose it is: the optimizer's `.grad` partition, DeepSpeed's
`accumulated_grads_in_cpu`, what a tier takes with `host_memory` and what is computed from these alone is the host's;
all else is the device's. Every operation that torch dispatches inside the copy path is counted by that.

trainfix's tiers run as on a GPU, with queues of their own (`CountedDevice`), each of which is immediate here. What a
kernel would do is one launch per group of rows, from the kernels' own table; the torch tier, whose gradients would have
to cross first, is one blocking copy per chunk. Only the run's third window is counted: the resident tier begins in the
second, and the first buckets bring their tables.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A Llama-style list of weights at a hundredth of the width; every size is a multiple of 16 bytes, as in real models.
HIDDEN, INNER, BLOCKS, WORDS = 64, 176, 4, 512
BUCKET = 100_000  # elements: a micro-batch takes several
WINDOWS = 3  # the last is counted


@dataclass
class Count:
    """What is counted, micro-batch after micro-batch of one window."""

    rows: list[Counter[str]] = field(default_factory=lambda: [Counter()])
    counting: bool = False
    host: dict[int, torch.UntypedStorage] = field(default_factory=dict)  # kept alive, so no address is another's later
    device_bytes: int = 0
    pinned_bytes: int = 0

    def add(self, **amounts: int) -> None:
        if self.counting:
            self.rows[-1].update(amounts)

    def is_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.host

    def mark_host(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.host[storage.data_ptr()] = storage
        return tensor


COUNT = Count()


class Counting(TorchDispatchMode):
    """Counts what is dispatched while it is entered."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if function.namespace == "aten":
            _count(function, arguments, result)
        return result


def _count(function: Any, arguments: Sequence[Any], result: Any) -> None:
    name = function.__name__.split(".")[0]
    inputs = [one for one in _flat(arguments) if isinstance(one, torch.Tensor)]
    outputs = [one for one in _flat([result]) if isinstance(one, torch.Tensor)]
    known = {one.untyped_storage().data_ptr() for one in inputs}
    new = [one for one in outputs if one.untyped_storage().data_ptr() not in known]
    if name == "lift_fresh":  # torch.tensor(number): made on the host
        for one in outputs:
            COUNT.mark_host(one)
    elif name == "copy_":
        _count_copy(arguments[0], arguments[1])
    elif name == "_local_scalar_dense":
        if not COUNT.is_host(inputs[0]):
            COUNT.add(syncs=1)
    elif inputs and all(COUNT.is_host(one) for one in inputs):
        for one in new:
            COUNT.mark_host(one)
    elif new or function._schema.is_mutable:  # what is neither is a view
        computes = bool(inputs) and not name.startswith(("empty", "new_empty"))
        COUNT.add(kernels=int(computes), temporary_bytes=sum(one.nbytes for one in new))


def _count_copy(into: torch.Tensor, source: torch.Tensor) -> None:
    kind = {
        (True, False): "host_to_device",
        (False, True): "device_to_host",
        (False, False): "device_to_device",
    }.get((COUNT.is_host(source), COUNT.is_host(into)))
    if kind is not None:
        COUNT.add(**{f"{kind}_bytes": source.nbytes, f"{kind}_copies": 1})


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@contextlib.contextmanager
def copy_path() -> Iterator[None]:
    """What happens within belongs to the copy path. May be nested."""
    if COUNT.counting or threading.current_thread() is not threading.main_thread():
        yield
        return
    COUNT.counting = True
    try:
        with Counting():
            yield
    finally:
        COUNT.counting = False


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What happens within stands for something that was counted already, or is no part of it."""
    before, COUNT.counting = COUNT.counting, False
    try:
        yield
    finally:
        COUNT.counting = before


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        with copy_path():
            return function(*arguments, **named)

    return run


class DeviceEvent:
    """An event of a stream. For the host to wait for it is a sync, wherever in the micro-batch it does; but not where
    it has waited for that much of the stream before."""

    def __init__(self, queue: CountedQueue, position: int) -> None:
        self._queue, self._position = queue, position

    def synchronize(self) -> None:
        if self._position > self._queue.waited_for:
            self._queue.waited_for = self._position
            if threading.current_thread() is threading.main_thread():
                COUNT.rows[-1]["syncs"] += 1


class CountedQueue:
    """A stream that is done with everything at once."""

    def __init__(self) -> None:
        self.done = self.waited_for = 0

    def do(self, operation: Callable[[], object]) -> None:
        self.done += 1
        operation()

    def record(self) -> DeviceEvent:
        return DeviceEvent(self, self.done)

    def wait(self, event: Any) -> None:
        if not isinstance(event, DeviceEvent):  # a thread's event: no stream can wait for it, so the host does
            event.synchronize()

    def uses(self, memory: torch.Tensor) -> None: ...


class CountedDevice:
    """A device with memory and queues of its own."""

    asynchronous = True

    def __init__(self) -> None:
        self._caller = CountedQueue()

    def caller(self) -> CountedQueue:
        return self._caller

    def queue(self) -> CountedQueue:
        return CountedQueue()

    def memory(self, size: int) -> torch.Tensor:
        COUNT.device_bytes += size
        return torch.empty(size, dtype=torch.uint8)

    def host_memory(self, size: int) -> torch.Tensor:
        COUNT.pinned_bytes += size
        return COUNT.mark_host(torch.empty(size, dtype=torch.uint8))

    def headroom(self) -> int | None:
        return None

    def pressure(self) -> int:
        return 0


def count_tiers(tier: str) -> None:
    """Let every Carrier that is made from here on be of this tier, on a `CountedDevice`."""
    from trainfix.gradcopy import carrier, choice, queues, squares
    from trainfix.gradcopy.arithmetic import CROSSING_ELEMENTS, TorchAdder
    from trainfix.gradcopy.kernels.launches import KernelAdder
    from trainfix.gradcopy.segments import Segment

    class CountedAdder(KernelAdder):
        """The kernels' launches, counted; torch does the sum."""

        def add(self, segments: Sequence[Segment], squares: torch.Tensor | None = None) -> None:
            super().add(segments, squares)
            with uncounted():
                if squares is None:
                    TorchAdder().add(segments)
                    return
                one = torch.zeros(1, dtype=torch.float64)
                for segment, sums in zip(segments, torch.split(squares, self.parts(segments)), strict=True):
                    TorchAdder().add([segment], one)
                    sums.zero_()[0] = one[0]

        def _launch(self, *arguments: Any, **named: Any) -> None:
            COUNT.add(kernels=1)

        def _layout(self, spans: Any) -> Any:
            if spans not in self._layouts:
                COUNT.add(new_tables=1, syncs=1)
            with uncounted():
                return super()._layout(spans)

    class CrossingAdder(TorchAdder):
        """What the torch tier does with gradients on a device: they cross first, and the host waits for that."""

        def add(self, segments: Sequence[Segment], squares: torch.Tensor | None = None) -> None:
            for one in segments:
                crossings = -(-one.gradient.numel() // CROSSING_ELEMENTS)
                COUNT.add(device_to_host_bytes=one.gradient.nbytes, device_to_host_copies=crossings, syncs=crossings)
            with uncounted():
                super().add(segments, squares)

    device: Any = CountedDevice()
    on_host = tier in ("torch", "host-add")

    def choose(partitions: Sequence[torch.Tensor], _: torch.device, wish: Any) -> tuple[Any, str]:
        for partition in partitions:
            COUNT.mark_host(partition)
        built = choice.build(tier, choice.Plan(device, CountedAdder(torch.device("cpu")), wish, True, choice.ELEMENTS))
        if tier == "torch":
            built._adder = CrossingAdder()  # type: ignore[attr-defined]
        return built, "counted"

    read = squares.Squares.read

    def read_back(self: Any) -> dict[int, float]:
        if not on_host and self._partial:  # in one copy for all of them, for which the host waits
            rooms = {id(room): room.nbytes for partial in self._partial.values() for room, _, _ in partial}
            COUNT.add(kernels=1, syncs=1, device_to_host_copies=1, device_to_host_bytes=sum(rooms.values()))
        with uncounted():
            return read(self)

    room = squares.Squares.room

    def host_room(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        if not on_host:
            return room(self, *arguments, **named)
        with uncounted():
            return COUNT.mark_host(room(self, *arguments, **named))

    moment = queues._Moment.synchronize

    def waited(self: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            COUNT.rows[-1]["thread_waits"] += 1
        moment(self)

    queues._Moment.synchronize = waited  # type: ignore[method-assign]
    carrier.choose = choose  # type: ignore[attr-defined]
    squares.Squares.read, squares.Squares.room = read_back, host_room  # type: ignore[method-assign]
    for name in ("accumulate", "wait", "squares", "renew"):
        setattr(carrier.Carrier, name, counted(getattr(carrier.Carrier, name)))


class Block(torch.nn.Module):
    """The weights of a Llama block, in its order; the attention is only a product of its parts."""

    def __init__(self) -> None:
        super().__init__()
        square, wide = (HIDDEN, HIDDEN), (HIDDEN, INNER)
        for name, shape in zip("qkvo", [square] * 4, strict=True):
            setattr(self, name, torch.nn.Linear(*shape, bias=False))
        for name, shape in (("gate", wide), ("up", wide), ("down", wide[::-1])):
            setattr(self, name, torch.nn.Linear(*shape, bias=False))
        self.before_attention = torch.nn.Parameter(torch.ones(HIDDEN))
        self.before_inner = torch.nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * self.before_attention
        x = x + self.o(torch.tanh(self.q(normed) * self.k(normed)) * self.v(normed))
        normed = x * self.before_inner
        return x + self.down(torch.tanh(self.gate(normed)) * self.up(normed))


class Network(torch.nn.Module):
    """Embedding, blocks, a last norm's weight and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, HIDDEN)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = torch.nn.Parameter(torch.ones(HIDDEN))
        self.head = torch.nn.Linear(HIDDEN, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(words)) * self.norm)


def start() -> ModuleType:
    """DeepSpeed on its CPU accelerator, with a group of one."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    communication: Any = importlib.import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda *_, **__: None  # a speed-up of collectives that takes long to compile
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def run(accumulation: int, tier: str | None) -> dict[str, Any]:
    """Train for three windows and count the third."""
    torch.set_num_threads(1)
    if tier is not None:
        importlib.import_module("trainfix")
    if tier not in (None, "auto"):
        count_tiers(tier)
    deepspeed = start()
    torch.manual_seed(0)
    model = Network().to(torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # 0.19.8 clips at 1 by default
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": BUCKET,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with torch.set_grad_enabled(not deepspeed.__version__.startswith("0.18.")):
        engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    sums, buckets = _watch(zero, optimizer)
    for window in range(WINDOWS):
        sums.clear()
        COUNT.rows = []
        for number in range(accumulation):
            COUNT.rows.append(Counter())
            buckets[0] = 0
            words = torch.randint(WORDS, (2, 16), generator=torch.Generator().manual_seed(100 * window + number))
            engine.backward(torch.nn.functional.cross_entropy(engine(words).float().flatten(0, 1), words.flatten()))
            engine.step()
    # For a slot that a thread still reads: from the micro-batch on in which all slots have been used once.
    waits = sum(row.pop("thread_waits", 0) for row in COUNT.rows)
    rows = [dict(sorted((+row).items())) for row in COUNT.rows]
    middle = rows[1:-1]
    if any(row != middle[0] for row in middle):
        raise SystemExit(f"the middle micro-batches differ: {middle}")
    buffers = [held.nbytes for held in zero.accumulated_grads_in_cpu.values()]
    return {
        "deepspeed": deepspeed.__version__,
        "accumulation": accumulation,
        "tier": tier,
        "elements": sum(parameter.numel() for parameter in model.parameters()),
        "parameters": len(list(model.parameters())),
        "buckets": buckets[0],
        "micro_batches": {"first": rows[0], "middle": middle[0], "boundary": rows[-1]},
        "thread_waits": waits,
        "pinned_bytes": sum(buffers) + COUNT.pinned_bytes,
        "device_bytes": COUNT.device_bytes + zero.temp_grad_buffer_for_gpu_offload.nbytes,
        "relative_error": sums["error"],
    }


def _watch(zero: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[Any, Any], list[int]]:
    """Count inside this optimizer's copy path. Returns the error of the sum, and how many buckets a micro-batch has."""
    for group in zero.single_partition_of_fp32_groups:
        COUNT.mark_host(group.grad)
    sums: dict[Any, Any] = {}
    buckets = [0]
    copy, reduce_bucket = zero.copy_grads_in_partition, zero.reduce_ipg_grads

    def copied(parameter: Any, *rest: Any) -> Any:
        key = zero.get_param_id(parameter)
        arrived = zero.get_param_gradient_attribute(parameter).detach().double().reshape(-1)
        sums[key] = sums[key] + arrived if key in sums else arrived
        for held in zero.accumulated_grads_in_cpu.values():
            COUNT.mark_host(held)
        with copy_path():
            return copy(parameter, *rest)

    def reduced(*arguments: Any, **named: Any) -> Any:
        buckets[0] += any(bucket.params for bucket in zero.ipg_buckets.values())
        return reduce_bucket(*arguments, **named)

    def consumed(*_: Any) -> None:
        wanted = torch.cat([sums[key].flatten() for key in sorted(sums)])
        found = torch.cat(
            [
                zero.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, int(begin), int(count))
                for group, _, begin, count in (zero.grad_position[key] for key in sorted(sums))
            ]
        )
        sums["error"] = float((found.double() - wanted).norm() / wanted.norm())

    zero.copy_grads_in_partition, zero.reduce_ipg_grads = copied, reduced
    for name in ("check_overflow", "scaled_global_norm"):
        setattr(zero, name, counted(getattr(zero, name)))
    if hasattr(zero, "_record_offload_copy"):  # from 0.19.8 on: on a device with streams it leaves an event
        stream = CountedQueue()

        def record() -> None:
            stream.do(lambda: None)
            zero._pending_offload_events[None] = stream.record()

        zero._record_offload_copy = record
    optimizer.register_step_pre_hook(consumed)
    return sums, buckets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--tier", help="with trainfix, in this tier")
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    print(json.dumps(run(options.accumulation, options.tier)), file=out, flush=True)
    out.close()
    os._exit(0)  # tearing gloo down can abort a process that has already answered


if __name__ == "__main__":
    main()
