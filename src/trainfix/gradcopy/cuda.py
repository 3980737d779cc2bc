"""CUDA's (and ROCm's) streams and events as queues."""

from __future__ import annotations

import torch

from trainfix.gradcopy.queues import Event, Operation, Queue


class _Stream:
    """A stream as a queue: `operation` is queued, not done, when `do` returns."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def do(self, operation: Operation) -> None:
        with torch.cuda.stream(self.stream):
            operation()

    def record(self) -> Event:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait(self, event: Event) -> None:
        if isinstance(event, torch.cuda.Event):
            self.stream.wait_event(event)
        else:  # a thread's: no stream can wait for it
            event.synchronize()

    def uses(self, memory: torch.Tensor) -> None:
        memory.record_stream(self.stream)


class CudaDevice:
    """One GPU. `device` has an index."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def caller(self) -> Queue:
        return _Stream(torch.cuda.current_stream(self.device))

    def queue(self) -> Queue:
        return _Stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def headroom(self) -> int | None:
        free, total = torch.cuda.mem_get_info(self.device)
        unused_at_peak = torch.cuda.max_memory_reserved(self.device) - torch.cuda.max_memory_allocated(self.device)
        return free + max(0, unused_at_peak) - total // 10

    def pressure(self) -> int:
        counts = torch.cuda.memory_stats_as_nested_dict(self.device)
        return int(counts.get("num_alloc_retries", 0)) + int(counts.get("num_ooms", 0))
