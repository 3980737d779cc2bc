"""Where work is queued: the few words in which a tier says what must come after what.

A queue does its operations one after the other. An event that it records fires when all that was queued before it is
done; a queue that waits for an event does nothing later before that. The ring and the other tiers are written in these
words alone, so that the tests can execute a schedule in every order that they permit, with a back end of their own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

Operation = Callable[[], object]


class Event(Protocol):
    """A point in a queue's work."""

    def synchronize(self) -> None:
        """Let the host wait until it is reached. Raises what an operation of a worker before it has raised."""


class Queue(Protocol):
    """A stream of a device, or a thread of the host."""

    def do(self, operation: Operation) -> None: ...

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None:
        """Nothing that is queued from here on begins before `event`. A stream lets the host wait for a thread."""

    def uses(self, memory: torch.Tensor) -> None:
        """Should `memory` be freed, it is nobody else's before what is queued here by then is done."""


class Device(Protocol):
    """What the gradients are on."""

    @property
    def asynchronous(self) -> bool:
        """Whether its queues run beside the host; else the caller's is the only one, and done at once."""

    def caller(self) -> Queue:
        """The queue on which the gradients are ordered, and on which the caller may overwrite them afterwards."""

    def queue(self) -> Queue:
        """One of our own, beside the caller's."""

    def memory(self, size: int) -> torch.Tensor:
        """uint8 [size] on the device. Raises torch.OutOfMemoryError."""

    def host_memory(self, size: int) -> torch.Tensor:
        """uint8 [size] on the host, that the device can copy to while others work."""

    def headroom(self) -> int | None:
        """Bytes that are free even at the peak so far, less a tenth of the device; None: as much as the host has."""

    def pressure(self) -> int:
        """How often memory was so short that an allocation had to be repeated, or failed."""


class Slot:
    """A piece of memory that is used again and again: by one user at a time, each after the last is done with it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._free: Event | None = None

    def forget(self) -> None:
        """Nobody uses it any more, and an error of its last user is nobody's."""
        self._free = None

    def take(self, queue: Queue) -> None:
        """What `queue` does from here on may overwrite it."""
        if self._free is not None:
            queue.wait(self._free)

    def release(self, queue: Queue) -> Event:
        """What `queue` has done up to here is the last that reads it. Returns the event of that."""
        self._free = queue.record()
        return self._free

    def view(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        return self.memory[: elements * dtype.itemsize].view(dtype)


class Slots:
    """Slots in turn, of one slab: `count` of them, `size` bytes each."""

    def __init__(self, slab: torch.Tensor, count: int) -> None:
        self._slots = [Slot(memory) for memory in slab.chunk(count)]
        self._next = 0

    def take(self, queue: Queue) -> Slot:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.take(queue)
        return slot

    def forget(self) -> None:
        for slot in self._slots:
            slot.forget()


class _Done:
    """The event of a queue that does everything at once."""

    def synchronize(self) -> None: ...


class _Immediate:
    """The host as a device: what is queued is done."""

    def do(self, operation: Operation) -> None:
        operation()

    def record(self) -> Event:
        return _Done()

    def wait(self, event: Event) -> None:
        event.synchronize()

    def uses(self, memory: torch.Tensor) -> None: ...


class HostDevice:
    """Gradients in ordinary memory."""

    asynchronous = False

    def caller(self) -> Queue:
        return _Immediate()

    def queue(self) -> Queue:
        return _Immediate()

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def headroom(self) -> int | None:
        return None

    def pressure(self) -> int:
        return 0


class _Moment:
    """A point in a worker's work."""

    def __init__(self, future: Future[object] | None) -> None:
        self._future = future

    def synchronize(self) -> None:
        if self._future is not None:
            self._future.result()


class Worker:
    """A thread of the host as a queue, made when it is first used and gone with its last user.

    An operation that raises is the last one: those behind it are not begun, and whoever waits for any of them gets its
    error. A forked child, which has no such thread, makes its own; the fork waits until nothing is under way.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[object] | None = None
        _workers.add(self)

    def do(self, operation: Operation) -> None:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="trainfix-gradcopy")
        before = self._last
        if before is not None and before.done():
            before.result()
            before = None
        self._last = self._executor.submit(_after, before, operation)

    def record(self) -> Event:
        return _Moment(self._last)

    def wait(self, event: Event) -> None:
        self.do(event.synchronize)

    def uses(self, memory: torch.Tensor) -> None: ...

    def reset(self) -> None:
        """Wait until nothing is under way, and forget an error."""
        if self._last is not None:
            self._last.exception()
        self._last = None

    def forked(self) -> None:
        self._executor = self._last = None


def _after(before: Future[object] | None, operation: Operation) -> object:
    if before is not None:
        before.result()
    return operation()


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _before_fork() -> None:
    for worker in list(_workers):
        if worker._last is not None:
            worker._last.exception()


def _in_child() -> None:
    for worker in list(_workers):
        worker.forked()


os.register_at_fork(before=_before_fork, after_in_child=_in_child)
