"""The schedules of the ring, of host-add and of the resident tier, in every order that their queues permit.

Every window has to end with the bits of a plain float32 sum, whatever ran early or late: with buckets that turn to
NaN behind each `add`, slots that turn to NaN when they are given back, and memory that comes with NaN in it. And each
wait that a schedule asks for is needed: without it some order goes wrong, or the other waits imply it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gradcopy import simulator
from tests.gradcopy.simulator import SimulatedDevice, Simulation
from trainfix.gradcopy import host_add, queues, ring
from trainfix.gradcopy.arithmetic import TorchAdder
from trainfix.gradcopy.host_add import HostAdd
from trainfix.gradcopy.resident import Resident
from trainfix.gradcopy.ring import Ring
from trainfix.gradcopy.segments import Piece, Segment

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Setting(NamedTuple):
    """What carries, and through how much memory. elements: of a slot. budget: of resident sums, in elements."""

    tier: str
    slots: int = 2
    stages: int = 2
    elements: int = 4
    overlap: bool = True
    budget: int | None = None
    callers: int = 1


class Bucket(NamedTuple):
    """One call of `add`: these keys' gradients. layout: in which order they lie in the bucket, or that they lie apart.

    short: the device runs short of memory before it. caller: on which of the caller's streams.
    """

    keys: Sequence[int]
    last: bool = False
    dtype: torch.dtype = BF16
    layout: str = "forwards"
    short: bool = False
    caller: int = 0


CHECK, RENEW = "the sums are read", "the window is over"
# Without a wait: in line, host-add promises them when `add` returns.
PEEK = "the sums are there already"
FREED = "the tier is gone, and its memory is somebody else's"
ELSEWHERE = "the host turns to the caller's first stream"
Script = Sequence[Bucket | str]


class Trainer:
    """Trains as a framework does, with one bucket that is filled again and again, and knows what is right."""

    def __init__(self, simulation: Simulation, setting: Setting, sizes: Sequence[int]) -> None:
        self.simulation, self.device = simulation, SimulatedDevice(simulation, setting.callers)
        flat = torch.full((sum(sizes),), math.nan)
        self.masters = dict(enumerate(flat.split(list(sizes))))
        self.right = {key: master.clone() for key, master in self.masters.items()}
        self.touched = set[int]()
        self.complete = set[int]()  # keys whose last gradient came as such
        # Room for gradients with a gap before each.
        self.buffer = torch.full((sum(sizes) + len(sizes),), math.nan)
        for memory in (flat, self.buffer):
            simulation.knows(memory)
        self.values = torch.Generator().manual_seed(0)
        self.stream = self.device.caller()
        self.tier = self._build(setting)

    def _build(self, setting: Setting) -> Ring | HostAdd | Resident:
        if setting.tier == "ring":
            return Ring(self.device, TorchAdder(), overlap=setting.overlap, elements=setting.elements)
        if setting.tier == "host-add":
            worker = self.simulation.worker()
            size = 4 * setting.elements
            return HostAdd(self.device, TorchAdder(), worker, overlap=setting.overlap, slot_bytes=size)
        below = self._build(setting._replace(tier=setting.tier.removeprefix("resident, ")))
        budget = None if setting.budget is None else 4 * setting.budget
        return Resident(below, self.device, TorchAdder(), budget)

    def follow(self, script: Script) -> None:
        for step in script:
            if isinstance(step, Bucket):
                self.add(step)
            elif step == CHECK:
                self.check()
            elif step == PEEK:
                self.compare()
            elif step == FREED:
                self.device.free()
            elif step == ELSEWHERE:
                self.device.current = 0
            else:
                self.renew()

    def add(self, bucket: Bucket) -> None:
        self.device.current = bucket.caller
        caller, memory = self.device.caller(), self.buffer.view(bucket.dtype)
        # A caller keeps its own buckets in order, and the gradients were made on its first stream.
        for before in {self.stream, self.device.callers[0]} - {caller}:
            caller.wait(before.record())
        self.stream = caller
        segments, plain, place = list[Segment](), list[Segment](), 0
        for key in reversed(bucket.keys) if bucket.layout == "backwards" else bucket.keys:
            count = self.masters[key].numel()
            place += bucket.layout == "apart"
            values = torch.randn(count, generator=self.values).to(bucket.dtype)
            gradient = memory.narrow(0, place, count)
            caller.do(partial(gradient.copy_, values))
            first = key not in self.touched
            segments.append(Segment(key, self.masters[key], gradient, first))
            plain.append(Segment(key, self.right[key], values, first))
            place += count
        self.device.shortages += bucket.short
        self.tier.add(segments, last=bucket.last)
        caller.do(partial(self.buffer.fill_, math.nan))
        TorchAdder().add(plain)
        self.touched.update(bucket.keys)
        self.complete = (self.complete | set(bucket.keys)) if bucket.last else self.complete - set(bucket.keys)

    def check(self) -> None:
        self.tier.wait()
        self.compare()
        with self.simulation.on_host():
            squares = self.tier.squares()
        assert squares.keys() <= self.complete
        for key, square in squares.items():
            right = float(self.right[key].double().square().sum())
            self._judge(math.isclose(square, right, rel_tol=1e-12), f"the sum of squares of {key}")

    def compare(self) -> None:
        for key, right in self.right.items():
            with self.simulation.on_host():
                here = self.masters[key].clone()
            self._judge(torch.equal(here.view(torch.int32), right.view(torch.int32)), f"the sum of {key}")

    def _judge(self, right: bool, what: str) -> None:
        assert right or self.simulation.traced, what

    def renew(self) -> None:
        """And the host does with the masters what it likes."""
        self.tier.renew()
        with self.simulation.on_host():
            for sums in (self.masters, self.right):
                for key in self.touched:
                    sums[key].fill_(-7)
        self.touched.clear()
        self.complete.clear()


class Case(NamedTuple):
    setting: Setting
    sizes: Sequence[int]
    script: Script

    def run(self, choose: simulator.Chooser, **how: int | bool) -> Simulation:
        """Execute it once. Raises AssertionError where a result is wrong, unless it is traced."""
        setting, simulation = self.setting, Simulation(choose, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "SLOTS", setting.slots)
            patch.setattr(ring, "STAGES", setting.stages)
            patch.setattr(host_add, "SLOTS", setting.slots)
            Trainer(simulation, setting, self.sizes).follow(self.script)
        simulation.finish()
        return simulation

    def traced(self, **mistake: int) -> Simulation:
        return self.run(simulator.by_rank([]), traced=True, **mistake)

    def goes_wrong(self, **mistake: int) -> bool:
        """Whether some order gives a wrong result: of the extreme ones, and of some at random."""
        names = [queue.name for queue in self.traced().queues]
        for choose in (*simulator.extremes(names), *map(simulator.at_random, range(200))):
            try:
                self.run(choose, **mistake)
            except AssertionError:
                return True
        return False


@pytest.fixture(autouse=True)
def poison():
    with simulator.poisoned_slots():
        yield


# The simulator itself.


@pytest.mark.parametrize("remembered", [True, False])
def test_every_order_is_counted_once(remembered):
    """Two queues of three operations have 20 orders. Only where memory tells them apart is each of them executed."""
    seen = set[tuple[float, ...]]()

    def run(choose: simulator.Chooser) -> None:
        simulation, log = Simulation(choose), torch.full((7,), 0.0)  # how many there are, and which
        if remembered:
            simulation.knows(log)

        def note(name: int) -> None:
            log[0] += 1
            log[int(log[0])] = name

        left, right = simulation.queue("left"), simulation.queue("right")
        for number in range(3):
            left.do(partial(note, number))
            right.do(partial(note, 10 + number))
        left.wait(right.record())
        left.record().synchronize()
        seen.add(tuple(log.tolist()))

    explored = simulator.every_order(run)
    assert explored.orders == 20
    assert (explored.executions == len(seen) == 20) == remembered


def test_what_only_one_order_shows_is_found():
    """The right queue reads between the left one's first two operations."""

    def run(choose: simulator.Chooser) -> None:
        simulation, memory = Simulation(choose), torch.zeros(3)
        simulation.knows(memory)
        left, right = simulation.queue("left"), simulation.queue("right")
        for place in range(2):
            left.do(partial(memory[place].fill_, 1))
        right.do(lambda: memory[2].copy_(memory[0] - memory[1]))
        left.do(lambda: memory[:2].fill_(2))
        left.wait(right.record())
        left.record().synchronize()
        assert memory[2] == 0

    run(simulator.by_rank(["left"]))
    run(simulator.by_rank(["right"]))
    with pytest.raises(AssertionError):
        simulator.every_order(run)


def test_an_event_that_nothing_reaches_is_an_error():
    simulation = Simulation(simulator.by_rank([]))
    left, right = simulation.queue("left"), simulation.queue("right")
    unreached = simulator.SimulatedEvent(right, simulation.number(), None)
    left.wait(unreached)
    with pytest.raises(simulator.Stuck, match="an event of left has not fired"):
        left.record().synchronize()


# The smallest cases in which every line of a schedule that waits has something to wait for.

WINDOW = [Bucket([0]), Bucket([0], last=True), CHECK]
TWO_KEYS = [Bucket([0, 1]), Bucket([0], last=True), CHECK]
FIRST_WINDOW = [Bucket([0, 1]), CHECK, RENEW]  # after which the resident sums have places
CASES = {
    "ring": Case(Setting("ring"), [6], WINDOW),
    "ring, one slot and one stage": Case(Setting("ring", slots=1, stages=1), [6], WINDOW),
    "ring, many slots": Case(Setting("ring", slots=8, stages=1), [6], WINDOW),
    "ring, many stages": Case(Setting("ring", slots=1, stages=8), [6], WINDOW),
    "ring, two windows": Case(
        Setting("ring"), [3, 2], [Bucket([0, 1], last=True), CHECK, RENEW, Bucket([1]), CHECK, RENEW]
    ),
    "ring, two streams": Case(Setting("ring", callers=2), [6], [Bucket([0], caller=1), Bucket([0]), CHECK]),
    "ring, in line": Case(Setting("ring", overlap=False), [6], [*WINDOW, RENEW, *WINDOW]),
    "ring, in line on two streams": Case(
        Setting("ring", overlap=False, callers=2), [6], [Bucket([0], caller=1), ELSEWHERE, CHECK]
    ),
    "host-add": Case(Setting("host-add"), [6], WINDOW),
    "host-add, one slot": Case(Setting("host-add", slots=1), [6], WINDOW),
    "host-add, many slots": Case(Setting("host-add", slots=8), [6], [*WINDOW, Bucket([0]), CHECK]),
    "host-add, in line": Case(
        Setting("host-add", overlap=False), [6], [Bucket([0]), PEEK, Bucket([0], last=True), PEEK, CHECK]
    ),
    "resident, ring": Case(Setting("resident, ring"), [3, 2], [*FIRST_WINDOW, *TWO_KEYS, RENEW, *TWO_KEYS]),
    "resident, host-add": Case(Setting("resident, host-add"), [3, 2], [*FIRST_WINDOW, *TWO_KEYS, RENEW, *TWO_KEYS]),
    "resident, not all": Case(
        Setting("resident, ring", budget=8), [3, 2], [*FIRST_WINDOW, *TWO_KEYS, RENEW, *TWO_KEYS]
    ),
    "resident, more after the last": Case(
        Setting("resident, ring"),
        [3, 2],
        [*FIRST_WINDOW, Bucket([0, 1], last=True), Bucket([0]), CHECK, Bucket([1]), CHECK],
    ),
    "resident, given back": Case(
        Setting("resident, ring", slots=8),
        [3, 2],
        [*FIRST_WINDOW, Bucket([0, 1]), Bucket([0], last=True, short=True), CHECK, RENEW, *TWO_KEYS],
    ),
    "resident, two streams": Case(
        Setting("resident, ring", callers=2), [3, 2], [*FIRST_WINDOW, Bucket([0, 1], caller=1), ELSEWHERE, CHECK]
    ),
}
# Nobody reads the sums of a window that is given up, so there only the wait of `renew` is needed.
GIVEN_UP = {
    "ring, given up": Case(Setting("ring"), [3, 2], [Bucket([0]), RENEW, Bucket([1]), CHECK]),
    "host-add, given up": Case(Setting("host-add"), [3, 2], [Bucket([0]), RENEW, Bucket([1]), CHECK]),
    "resident, given up": Case(
        Setting("resident, ring"), [3, 2], [*FIRST_WINDOW, Bucket([0], last=True), RENEW, Bucket([1]), CHECK]
    ),
    "resident, given up after more": Case(
        Setting("resident, ring"),
        [3, 2],
        [*FIRST_WINDOW, Bucket([0], last=True), Bucket([0]), RENEW, Bucket([1]), CHECK],
    ),
}
ALL = CASES | GIVEN_UP
# Lines that wait although no order goes wrong without them.
EXPLAINED = {
    "host_add: stage = self._stages.take(caller)": "there is a slot per stage, and who waits for the slot has waited",
    "resident: caller.wait(event)": "a torn sum at home is sent once more",
}


@pytest.mark.parametrize("name", ALL)
def test_every_order_that_the_queues_permit_gives_the_same_bits(name):
    explored = simulator.every_order(ALL[name].run)
    assert explored.orders >= explored.executions > 1


TWO_WINDOWS = [
    *(Bucket([0, 1]), Bucket([1]), Bucket([0, 1], last=True), CHECK, RENEW),
    *(Bucket([1]), Bucket([0, 1]), Bucket([0], last=True), CHECK),
]


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["ring", "host-add", "resident, ring"])
def test_two_windows_give_the_same_bits_in_more_orders_than_could_be_executed_one_by_one(tier):
    explored = simulator.every_order(Case(Setting(tier, slots=3, budget=8), [6, 5], TWO_WINDOWS).run)
    assert explored.orders > 10**9


@pytest.mark.parametrize("name", ALL)
def test_nothing_touches_memory_that_another_queue_may_be_writing(name):
    assert not ALL[name].traced().order.races()


@cache
def needed(name: str) -> dict[int, str]:
    """The waits of a case that keep two operations on the same bytes in order: number -> line."""
    order = ALL[name].traced().order
    return {number: wait.line for number, wait in enumerate(order.waits) if order.races(without=[number])}


@pytest.mark.parametrize("name", CASES)
def test_a_missing_wait_shows_in_the_results_of_some_order(name):
    assert needed(name) or "in line" in name
    for number, line in needed(name).items():
        assert CASES[name].goes_wrong(dropped=number) or line in EXPLAINED, f"wait {number}, {line}"


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_window_that_is_given_up_leaves_nothing_under_way(name):
    renewing = [number for number, line in needed(name).items() if "synchronize" in line or "reset" in line]
    assert any(GIVEN_UP[name].goes_wrong(dropped=number) for number in renewing)


def test_no_line_of_a_schedule_waits_in_vain():
    """In some case each line keeps apart what else would collide."""
    asks = re.compile(r"(?<!self)(?<!_below)\.(wait|synchronize|take|reset)\(")
    lines = {
        f"{module}: {line.partition('  #')[0].strip()}"
        for module in ("ring", "host_add", "resident")
        for line in (Path(queues.__file__).parent / f"{module}.py").read_text(encoding="utf-8").splitlines()
        if asks.search(line)
    }
    assert lines - {line for name in ALL for line in needed(name).values()} == {
        "host_add: stage = self._stages.take(caller)"
    }


@pytest.mark.parametrize("name", CASES)
def test_a_slot_that_is_given_back_before_its_last_user_is_done_shows_in_the_results(name):
    case = CASES[name]
    racing = [n for n in range(case.traced().releases) if case.traced(early=n).order.races()]
    # In two windows of one stretch each the slots suffice, and the host waits for each window.
    assert racing or "in line" in name or "resident" in name or name == "ring, two windows"
    assert all(case.goes_wrong(early=number) for number in racing)


@pytest.mark.parametrize("name", ["ring", "host-add"])
def test_a_slot_that_two_users_have_at_once_shows_in_the_results(name, monkeypatch):
    class Twice(queues.Slots):
        def __init__(self, slab: torch.Tensor, count: int) -> None:
            super().__init__(slab[: slab.numel() // count].repeat(1), 1)
            self._slots = [queues.Slot(self._slots[0].memory) for _ in range(count)]

    assert not CASES[name].goes_wrong()
    monkeypatch.setattr(ring, "Slots", Twice)
    monkeypatch.setattr(host_add, "Slots", Twice)
    assert CASES[name].goes_wrong()


@pytest.mark.parametrize("name", ["ring", "host-add"])
def test_reading_the_bucket_later_than_the_callers_stream_does_shows_in_the_results(name, monkeypatch):
    """The kernel, or the thread, reads the bucket itself and not the copy that was made in line."""
    monkeypatch.setattr(Piece, "read_from", lambda piece, memory, segments: list(segments))
    assert CASES[name].goes_wrong()


# The tier is dropped while its operations are queued. On two streams only the slabs: who allocates sums of squares is
# the stream that goes on.
DROPPED = {
    "ring": Case(Setting("ring"), [6], [Bucket([0]), Bucket([0], last=True), FREED]),
    "ring, two streams": Case(Setting("ring", callers=2), [6], [Bucket([0], caller=1), FREED]),
    "ring, in line on two streams": Case(
        Setting("ring", overlap=False, callers=2), [6], [Bucket([0], caller=1), Bucket([0], caller=1), FREED]
    ),
    "host-add": Case(Setting("host-add"), [6], [Bucket([0]), Bucket([0]), FREED]),
    "host-add, two streams": Case(Setting("host-add", callers=2), [6], [Bucket([0], caller=1), FREED]),
    "resident": Case(Setting("resident, ring"), [3, 2], [*FIRST_WINDOW, Bucket([0, 1], last=True), FREED]),
    "resident, two streams": Case(
        Setting("resident, ring", callers=2), [3, 2], [*FIRST_WINDOW, Bucket([0, 1], caller=1), FREED]
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_memory_that_is_freed_is_nobody_elses_before_the_work_in_it_is_done(name):
    assert not DROPPED[name].traced().order.races()


def test_no_line_says_in_vain_who_uses_memory():
    said, needed = set[str](), set[str]()
    for case in DROPPED.values():
        order, lines = case.traced().order, dict[str, list[int]]()
        for number, wait in enumerate(order.waits):
            lines.setdefault(wait.line, []).append(number)
        said |= {line for line in lines if ".uses(" in line}
        needed |= {line for line, numbers in lines.items() if order.races(without=numbers)}
    # The link reads what the caller has put there, and is done later.
    assert said - needed == {"host_add: caller.uses(self._stage_slab)"}


# Any training, in random orders.


@st.composite
def trainings(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    setting = Setting(
        draw(st.sampled_from(["ring", "host-add", "resident, ring", "resident, host-add"])),
        slots=draw(st.integers(1, 4)),
        stages=draw(st.integers(1, 4)),
        elements=2 * draw(st.integers(1, 6)),
        overlap=draw(st.sampled_from([True, True, False])),
        budget=draw(st.none() | st.integers(0, 40)),
        callers=2,
    )
    return Case(setting, sizes, [step for _ in range(draw(st.integers(1, 3))) for step in draw(windows(len(sizes)))])


@st.composite
def windows(draw: st.DrawFn, keys: int) -> Script:
    script, dtype = list[Bucket | str](), draw(st.sampled_from([BF16, FP16, FP32]))
    stream = draw(st.integers(0, 1))
    for left in reversed(range(draw(st.integers(1, 4)))):
        chosen = draw(st.lists(st.integers(0, keys - 1), unique=True))
        border = draw(st.integers(0, len(chosen)))
        for part in (chosen[:border], chosen[border:]):
            layout, short = draw(st.sampled_from(["forwards", "backwards", "apart"])), draw(st.integers(0, 9)) == 9
            script.append(Bucket(part, left == 0, dtype, layout, short, draw(st.integers(0, 1)) if short else stream))
        if draw(st.integers(0, 4)) == 4:
            script += [ELSEWHERE, CHECK]  # and more of the window afterwards
    return [*script, RENEW] if draw(st.integers(0, 4)) == 4 else [*script, ELSEWHERE, CHECK, RENEW]


@settings(max_examples=150, deadline=None)
@given(trainings(), st.integers(0, 2**32))
def test_any_training_gives_the_same_bits_in_any_order(case, seed):
    for number in range(3):
        case.run(simulator.at_random(seed + number))
    assert not case.traced().order.races()
