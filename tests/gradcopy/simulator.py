"""A device that does its work in any order that its queues and events permit.

It speaks the words of `trainfix.gradcopy.queues`. What a schedule queues is only collected; a chooser says which queue
goes on whenever the host waits for an event, and how much more is done before the host goes on. Operations work on
ordinary tensors and are done whole, one after another: where nothing orders two of them, both orders occur.

Beside it stands the order itself, as a graph: what is certain to be done before what, and which bytes each operation
reads and writes. Two that touch the same bytes, one of them writing, with nothing that orders them, are a race.
"""

from __future__ import annotations

import ctypes
import itertools
import linecache
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Container, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainfix.gradcopy import queues

# (the simulation, the names of who may go on) -> the index of who does.
Chooser = Callable[["Simulation", Sequence[str]], int]

HOST = "host"
_PACKAGE = Path(queues.__file__).parent


class Stuck(AssertionError):
    """The host waits for an event that no order reaches."""


class Wait(NamedTuple):
    """One edge from an event to what waits for it: a queue, or the host. line: the schedule's own, that asks for it."""

    line: str
    source: int
    target: int


class Span(NamedTuple):
    """Bytes of memory, from `begin` up to `end`."""

    begin: int
    end: int
    written: bool


class Order:
    """What is done before what. Nodes are operations, waits and moments of the host."""

    def __init__(self) -> None:
        self.waits = list[Wait]()
        self.spans = dict[int, list[Span]]()  # node -> what it touches
        self._before = list[list[int]]()

    def node(self, *before: int | None) -> int:
        self._before.append([one for one in before if one is not None])
        return len(self._before) - 1

    def edge(self, line: str, source: int | None, target: int) -> None:
        """`source` comes before `target` because of one wait and, as far as that says, of nothing else."""
        self.waits.append(Wait(line, -1 if source is None else source, target))

    def races(self, *, without: Collection[int] = ()) -> list[tuple[int, int]]:
        """Nodes that touch the same bytes in no certain order, optionally without some waits."""
        before = [list(nodes) for nodes in self._before]
        for number, wait in enumerate(self.waits):
            if number not in without and wait.source >= 0:
                before[wait.target].append(wait.source)
        reached = list[int]()  # for each node the set, as bits, of what is certainly done before it
        for nodes in before:
            reached.append(reduce(int.__or__, (reached[one] | 1 << one for one in nodes), 0))
        return [
            (one, other) for one, other in self._conflicts() if not (reached[one] >> other | reached[other] >> one) & 1
        ]

    def _conflicts(self) -> Iterator[tuple[int, int]]:
        for one, other in itertools.combinations(self.spans, 2):
            pairs = itertools.product(self.spans[one], self.spans[other])
            if any((a.written or b.written) and a.begin < b.end and b.begin < a.end for a, b in pairs):
                yield one, other


class _Traced(TorchDispatchMode):
    """Notes what of `memory` (by the addresses of its storages) the operations of torch touch."""

    def __init__(self, memory: Container[int], spans: list[Span]) -> None:
        super().__init__()
        self._memory, self._spans = memory, spans

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, declared in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(declared.name)
            written = declared.alias_info is not None and declared.alias_info.is_write
            if declared.alias_info is None or written:  # else it makes a view
                for tensor in given if isinstance(given, (list, tuple)) else [given]:
                    self._note(tensor, written)
        return func(*args, **kwargs)

    def _note(self, tensor: object, written: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() not in self._memory:
            return
        assert tensor.is_contiguous()
        begin = tensor.data_ptr()
        self._spans.append(Span(begin, begin + tensor.numel() * tensor.element_size(), written))


class SimulatedEvent:
    def __init__(self, queue: SimulatedQueue, number: int, node: int | None) -> None:
        self.queue, self.number, self.node = queue, number, node
        self.fired = False

    def __hash__(self) -> int:  # sets of events are walked in the same order in every execution
        return self.number

    def synchronize(self) -> None:
        self.queue.simulation.synchronize(self)


class _Until(NamedTuple):
    """The queue goes on after the event."""

    event: SimulatedEvent


class _Operations(NamedTuple):
    """Done at once, as the node of the order."""

    node: int
    operations: list[queues.Operation]


class SimulatedQueue:
    """A stream."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation, self.name = simulation, name
        self.pending = deque[SimulatedEvent | _Until | _Operations]()
        self.done = 0
        self.last: int | None = None  # the node of what was queued last
        self.before_last: int | None = None

    def do(self, operation: queues.Operation) -> None:
        self.before_last = self.last
        self.last = self.simulation.order.node(self.last, self.simulation.host)
        self.pending.append(_Operations(self.last, [operation]))

    def afterwards(self, operation: queues.Operation) -> None:
        """Part of the operation before: nothing else comes in between."""
        if not self.pending:
            operation()
            return
        last = self.pending[-1]
        assert isinstance(last, _Operations), "what is queued last is no operation"
        last.operations.append(operation)

    def record(self, *, early: bool = False) -> SimulatedEvent:
        """early: a mistake, the event fires before the last operation."""
        event = SimulatedEvent(self, self.simulation.number(), self.before_last if early else self.last)
        self.pending.append(event)
        if early:
            backwards = list(itertools.takewhile(lambda one: not isinstance(one, _Operations), reversed(self.pending)))
            if len(backwards) < len(self.pending):
                self.pending.pop()
                self.pending.insert(len(self.pending) - len(backwards), event)
        return event

    def wait(self, event: SimulatedEvent) -> None:
        if isinstance(event.queue, SimulatedWorker) and not isinstance(self, SimulatedWorker):
            event.synchronize()  # no stream can wait for a thread
            return
        self.last = self.simulation.order.node(self.last, self.simulation.host)
        if self.simulation.counts(event, self.last):
            self.pending.append(_Until(event))

    def uses(self, memory: torch.Tensor) -> None:
        self.simulation.fresh(memory)
        self.simulation.users.setdefault((memory.untyped_storage().data_ptr(), self), _line())

    def settle(self) -> bool:
        """Fire events and pass waits as far as that goes without an operation. Returns whether anything was done."""
        before = len(self.pending)
        while self.pending:
            head = self.pending[0]
            if isinstance(head, _Operations) or (isinstance(head, _Until) and not head.event.fired):
                break
            self.pending.popleft()
            if isinstance(head, SimulatedEvent):
                head.fired = True
        return len(self.pending) < before

    @property
    def ready(self) -> bool:
        return bool(self.pending) and isinstance(self.pending[0], _Operations)

    def step(self) -> None:
        head = self.pending.popleft()
        assert isinstance(head, _Operations)
        with self.simulation.noting(head.node):
            for operation in head.operations:
                operation()
        self.done += 1


class SimulatedWorker(SimulatedQueue):
    """A thread of the host."""

    def reset(self) -> None:
        self.record().synchronize()


class Simulation:
    """Queues, the memory that they work on, and one order of execution, which `choose` makes.

    Two mistakes can be made in it, by number in the order in which the host comes to them. dropped: a wait that is left
    out. early: a release of a slot before its last user is done. traced: note which bytes the operations touch.
    """

    def __init__(
        self, choose: Chooser, *, dropped: int | None = None, early: int | None = None, traced: bool = False
    ) -> None:
        self.choose, self.dropped, self.early, self.traced = choose, dropped, early, traced
        self.releases = 0
        self.users = dict[tuple[int, SimulatedQueue], str]()  # of which memory, and the line that says so
        self.order = Order()
        self.queues = list[SimulatedQueue]()
        self.host: int | None = None  # the node of the host's last wait
        self._memory = dict[int, torch.Tensor]()
        self._number = 0

    def number(self) -> int:
        self._number += 1
        return self._number

    def queue(self, name: str) -> SimulatedQueue:
        self.queues.append(SimulatedQueue(self, name))
        return self.queues[-1]

    def worker(self) -> SimulatedWorker:
        worker = SimulatedWorker(self, "worker")
        self.queues.append(worker)
        return worker

    def known(self) -> Collection[torch.Tensor]:
        return self._memory.values()

    def knows(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory whose contents are part of the state."""
        return self._memory.setdefault(memory.untyped_storage().data_ptr(), memory)

    def fresh(self, memory: torch.Tensor) -> None:
        """What nobody has written yet is no number."""
        if memory.untyped_storage().data_ptr() not in self._memory:
            self.knows(memory).view(torch.uint8).fill_(255)

    def counts(self, event: SimulatedEvent, target: int) -> bool:
        """Note one wait. Returns False where it is the one that is left out."""
        self.order.edge(_line(), event.node, target)
        return len(self.order.waits) - 1 != self.dropped

    def synchronize(self, event: SimulatedEvent) -> None:
        self.host = self.order.node(self.host)
        if not self.counts(event, self.host):
            return
        while True:
            self._settle()
            able = [queue for queue in self.queues if queue.ready]
            names = [HOST] * event.fired + [queue.name for queue in able]
            if not names:
                raise Stuck(f"nothing can be done, and an event of {event.queue.name} has not fired")
            chosen = names[self.choose(self, names) if len(names) > 1 else 0]
            if chosen == HOST:
                return
            next(queue for queue in able if queue.name == chosen).step()

    def on_host(self) -> AbstractContextManager[object]:
        """In it the host reads or writes memory."""
        self.host = self.order.node(self.host)
        return self.noting(self.host)

    def noting(self, node: int) -> AbstractContextManager[object]:
        return _Traced(self._memory, self.order.spans.setdefault(node, [])) if self.traced else nullcontext()

    def finish(self) -> None:
        """Do what is left."""
        self._settle()
        while able := [queue for queue in self.queues if queue.ready]:
            able[0].step()
            self._settle()
        if any(queue.pending for queue in self.queues):
            raise Stuck("nothing can be done, and something is left")

    def _settle(self) -> None:
        while sum(queue.settle() for queue in self.queues):
            pass

    def state(self) -> Hashable:
        """All that what follows depends on: how far the host and every queue are, and what stands in memory."""
        memory = [one.untyped_storage() for one in self._memory.values()]
        contents = b"".join(ctypes.string_at(one.data_ptr(), one.nbytes()) for one in memory)
        progress = tuple((queue.done, len(queue.pending)) for queue in self.queues)
        return self._number, len(self.order.waits), progress, contents


class SimulatedDevice:
    """`callers`: how many streams the caller has. Its memory was somebody's whose last operation is still queued."""

    asynchronous = True

    def __init__(self, simulation: Simulation, callers: int = 1) -> None:
        self.simulation = simulation
        self.callers = [simulation.queue(f"caller {number}") for number in range(callers)]
        self.current = 0
        self.room: int | None = None
        self.slabs = list[torch.Tensor]()
        self.shortages = 0

    def caller(self) -> SimulatedQueue:
        return self.callers[self.current]

    def queue(self) -> SimulatedQueue:
        return self.simulation.queue(f"own {len(self.simulation.queues)}")

    def memory(self, size: int) -> torch.Tensor:
        memory = self.host_memory(size)
        self.slabs.append(memory)
        self.caller().do(partial(memory.fill_, 255))
        return memory

    def host_memory(self, size: int) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        self.simulation.fresh(memory)
        return memory

    def free(self) -> None:
        """Each piece of the device's memory is somebody else's, who goes on after what the first stream does by now."""
        rooms = [memory for memory in self.simulation.known() if memory.dtype == torch.float64]
        stream, order = self.callers[0], self.simulation.order
        for memory in (*self.slabs, *rooms):
            owner = self.simulation.queue("somebody else")
            owner.last = stream.last
            owner.pending.append(_Until(stream.record()))
            for (address, user), line in self.simulation.users.items():
                if address == memory.untyped_storage().data_ptr() and user is not stream:
                    owner.last = order.node(owner.last)
                    order.edge(line, user.last, owner.last)
                    owner.pending.append(_Until(user.record()))
            owner.do(partial(memory.view(torch.uint8).fill_, 255))

    def headroom(self) -> int | None:
        return self.room

    def pressure(self) -> int:
        return self.shortages


def _line() -> str:
    """The line of a tier that asks for the wait: module: text."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == _PACKAGE and path.stem != "queues":
            text, _, _ = linecache.getline(str(path), frame.f_lineno).partition("  #")
            return f"{path.stem}: {text.strip()}"
        frame = frame.f_back
    return "the test"


@contextmanager
def poisoned_slots() -> Iterator[None]:
    """A slot that is given back holds no number any more, from the moment of its release on."""

    def release(slot: queues.Slot, queue: SimulatedQueue) -> queues.Event:
        early = queue.simulation.releases == queue.simulation.early
        queue.simulation.releases += 1
        if not early:
            queue.afterwards(lambda: slot.memory.fill_(255))
        slot._free = queue.record(early=early)
        return slot._free

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queues.Slot, "release", release)
        yield


# Orders.


def by_rank(ranks: Sequence[str]) -> Chooser:
    """Whoever stands first in `ranks` goes on as long as it can; who is not in it comes last."""
    rank = {name: place for place, name in enumerate(ranks)}
    return lambda _, names: min(range(len(names)), key=lambda one: rank.get(names[one], len(rank)))


def at_random(seed: int) -> Chooser:
    """Some are fast and some are slow, differently for every seed."""
    source, speeds = random.Random(seed), dict[str, float]()

    def choose(_: Simulation, names: Sequence[str]) -> int:
        weights = [speeds.setdefault(name, math.exp(source.uniform(-4, 0))) for name in names]
        return source.choices(range(len(names)), weights)[0]

    return choose


def extremes(names: Sequence[str]) -> Iterator[Chooser]:
    """Every ranking of the host and the queues: the orders in which a missing wait shows first."""
    return map(by_rank, itertools.permutations([HOST, *names]))


class Explored(NamedTuple):
    """orders: how many there are, by exact count. executions: how many were needed to see every state of them."""

    orders: int
    executions: int


class _Known(Exception):
    def __init__(self, orders: int) -> None:
        self.orders = orders


class _Branch:
    def __init__(self, state: Hashable, options: int) -> None:
        self.state, self.options, self.taken, self.orders = state, options, 0, 0


def every_order(run: Callable[[Chooser], object]) -> Explored:
    """Execute `run` in every order. Raises what the first order that fails raises.

    Depth first. What follows from a state depends on nothing but the state, so an execution that comes to one whose
    continuations have all been executed ends there.
    """
    path, finished, executions = list[_Branch](), dict[Hashable, int](), 0
    while True:
        depth = itertools.count()

        def choose(simulation: Simulation, names: Sequence[str], depth: Iterator[int] = depth) -> int:
            here = next(depth)
            if here == len(path):
                state = simulation.state()
                if state in finished:
                    raise _Known(finished[state])
                path.append(_Branch(state, len(names)))
            return path[here].taken

        executions += 1
        try:
            run(choose)
            orders = 1
        except _Known as known:
            orders = known.orders
        while path:
            path[-1].orders += orders
            path[-1].taken += 1
            if path[-1].taken < path[-1].options:
                break
            done = path.pop()
            orders = finished[done.state] = done.orders
        if not path:
            return Explored(orders, executions)
