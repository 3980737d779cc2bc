"""Every sensible order of four events on the stand-in package, each in an interpreter of its own: the child's side.

`python -m tests.engine.orders FOLDER PART PARTS` runs its part of the sequences and prints a JSON list of complaints.
A warm interpreter that has imported neither trainfix nor the stand-in forks one child per sequence. After every event
the child compares what it sees with a model of a few rules (class Model), so the shorter sequences are tested as the
beginnings of the longer ones.
"""

from __future__ import annotations

import ast  # noqa: F401  imported, as others below, to be warm: each child starts fast then
import gc
import hashlib  # noqa: F401
import importlib
import importlib.metadata
import io
import itertools
import json
import linecache  # noqa: F401
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import packaging.specifiers  # noqa: F401
import wrapt  # noqa: F401

from tests.support import standin

EVENTS = (
    "import trainfix",  # the second time: importlib.reload(trainfix), which activates again
    "import target",
    "import half",  # the target is imported, and imports trainfix while it is half imported itself
    "from-import",  # a new user module takes Engine and total
    "apply",
    "revert",
    "reload core",
    "reload functions",
    "build",
    "fork",
    "thread",  # three threads import the target and a user module at once
)
_AT_MOST = {"import trainfix": 2, "from-import": 2, "build": 2, "fork": 1, "thread": 1}
_LOADS = ("import target", "import half", "from-import", "build", "thread")


def sequences(length: int = 4) -> Iterator[tuple[str, ...]]:
    """Every order of `length` events that makes sense and has trainfix in it."""
    for sequence in itertools.product(EVENTS, repeat=length):
        if all(_makes_sense(sequence[:i], event) for i, event in enumerate(sequence)) and _active(sequence):
            yield sequence


def _active(before: tuple[str, ...]) -> bool:
    return "import trainfix" in before or "import half" in before


def _makes_sense(before: tuple[str, ...], event: str) -> bool:
    loaded = any(load in before for load in _LOADS)
    if event in ("apply", "revert"):
        return _active(before)
    if event.startswith("reload"):
        return loaded
    if event == "import target":
        return not loaded
    if event == "import half":
        return not loaded and not _active(before)
    return before.count(event) < _AT_MOST[event]


class Model:
    """What must be true, as rules:

    - trainfix wants the repair from its import on, until a revert, and again from an apply on.
    - A (re)load makes a new generation of a module. It is repaired from the moment that trainfix wants it and knows it.
    - A revert takes the repair from every generation; an apply gives it to the newest one.
    - Whoever took a name or built an object has the generation of that moment, whatever happened before or after.
    """

    def __init__(self) -> None:
        self.active = False
        self.wanted = False
        self.repaired: dict[str, list[bool]] = {"core": [], "functions": []}

    def event(self, event: str) -> None:
        loaded = bool(self.repaired["core"])
        if event in _LOADS and not loaded:
            self.repaired = {"core": [False], "functions": [False]}
        if event in ("import trainfix", "import half") and not self.active:
            self.active = self.wanted = True
        if event.startswith("reload"):
            self.repaired[event.split()[1]].append(False)
        if event in ("apply", "revert"):
            self.wanted = event == "apply"
        if self.wanted:
            for generations in self.repaired.values():
                generations[-1:] = [True] * len(generations[-1:])
        if event == "revert":
            self.repaired = {name: [False] * len(generations) for name, generations in self.repaired.items()}

    @property
    def state(self) -> str:
        if not self.wanted:
            return "reverted"
        return "applied" if self.repaired["core"] else "waiting"


class World:
    """The real thing, in this interpreter, and everybody who ever took something from the stand-in."""

    def __init__(self) -> None:
        self.model = Model()
        self.totals: list[tuple[int, Any, str]] = []  # generation, module, where its attribute `total` was taken
        self.classes: list[tuple[int, Any]] = []
        self.engines: list[tuple[int, Any]] = []
        self.originals: dict[tuple[str, int], Any] = {}
        self.users = 0

    def do(self, event: str) -> None:
        before = self.live()
        again = self.model.active and event == "import trainfix"
        again = again or (event == "apply" and self.model.wanted) or (event == "revert" and not self.model.wanted)
        getattr(self, event.replace(" ", "_").replace("-", "_"))()
        self.model.event(event)
        if not self.classes and "standin.core" in sys.modules:
            self._note("core")
            self._note("functions")
        if event.startswith("reload"):
            self._note(event.split()[1])
        if event == "from-import" or event == "thread":
            self._took(sys.modules[f"user{self.users - 1}"])
        if event == "build":
            self.engines.append((self._newest("core"), sys.modules["standin.core"].Engine(2)))
        if again and [id(x) for x in self.live()] != [id(x) for x in before]:
            raise AssertionError("doing it a second time changed something")
        self.check()

    def import_trainfix(self) -> None:
        if "trainfix" in sys.modules:
            importlib.reload(sys.modules["trainfix"])
        else:
            import trainfix  # noqa: F401

    def import_target(self) -> None:
        import standin.core  # noqa: F401

    def import_half(self) -> None:
        os.environ["STANDIN_PLUGIN"] = "trainfix"
        self.import_target()

    def from_import(self) -> None:
        importlib.import_module(f"user{self.users}")
        self.users += 1

    def apply(self) -> None:
        sys.modules["trainfix"].apply()

    def revert(self) -> None:
        sys.modules["trainfix"].revert()

    def reload_core(self) -> None:
        importlib.reload(sys.modules["standin.core"])

    def reload_functions(self) -> None:
        importlib.reload(sys.modules["standin.functions"])

    def build(self) -> None:
        self.import_target()

    def fork(self) -> None:
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def thread(self) -> None:
        start = threading.Barrier(3)
        user = f"user{self.users}"

        def work(name: str) -> None:
            start.wait()
            importlib.import_module(name)

        threads = [threading.Thread(target=work, args=(name,)) for name in ("standin.functions", "standin.core", user)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.users += 1

    def _newest(self, module: str) -> int:
        return len(self.model.repaired[module]) - 1

    def _note(self, module: str) -> None:
        """A new generation of `module` is there: remember who has it, and its original functions."""
        if module == "core":
            self.classes.append((self._newest("core"), sys.modules["standin.core"].Engine))
            self.totals = [row for row in self.totals if row[2] != "core"]
            self.totals.append((self._newest("functions"), sys.modules["standin.core"], "core"))
        else:
            self.totals = [row for row in self.totals if row[2] != "functions"]
            self.totals.append((self._newest("functions"), sys.modules["standin.functions"], "functions"))

    def _took(self, user: Any) -> None:
        self.classes.append((self._newest("core"), user.Engine))
        self.totals.append((self._newest("functions"), user, user.__name__))

    def live(self) -> list[Any]:
        """Every object that a repair could have touched."""
        found = [module.total for _, module, _ in self.totals]
        for _, cls in self.classes:
            found += [vars(cls)[name] for name in ("__init__", "boundary", "keep", "step", "backward")]
            found.append(_inside(vars(cls)["backward"]))
        return found

    def check(self) -> None:
        repaired = self.model.repaired
        for generation, module, where in self.totals:
            right = repaired["functions"][generation]
            assert (module.total([1, 2, 3]) == 6) is right, f"total as taken by {where}, repaired should be {right}"
            self._same_original(("total", generation), module.total, right)
        for generation, cls in self.classes:
            right = repaired["core"][generation]
            self._check_class(generation, cls, right)
        for generation, engine in self.engines:
            _check_engine(engine, repaired["core"][generation], "an engine built earlier")
        if "trainfix" in sys.modules:
            self._check_status()

    def _check_class(self, generation: int, cls: Any, right: bool) -> None:
        _check_engine(cls(2), right, "a new engine")
        for name in ("keep", "step"):
            self._same_original((name, generation), vars(cls)[name], right)
        self._same_original(("backward", generation), _inside(vars(cls)["backward"]), right)
        for name in ("__init__", "boundary"):
            guarded = type(vars(cls)[name]) is not FunctionType
            assert guarded is (right and name == "__init__"), f"{name} guarded: {guarded}"

    def _same_original(self, key: tuple[str, int], live: Any, right: bool) -> None:
        plain = getattr(live, "__wrapped__", live)
        assert (plain is not live) is right, f"{key[0]} is replaced: {plain is not live}, should be {right}"
        assert self.originals.setdefault(key, plain) is plain, f"{key[0]}: not the original object of its generation"

    def _check_status(self) -> None:
        expected = dict.fromkeys(standin.IDS, self.model.state)
        assert standin.states() == expected, f"status says {standin.states()}, expected {self.model.state}"
        from trainfix.engine import finder, lifecycle, register

        assert sum(isinstance(one, finder.Finder) for one in sys.meta_path) == 1, "more than one finder"
        repair = register.repairs.get("standin")
        if repair is not None and not self.model.wanted:
            assert not repair.journal, "the journal is not empty after a revert"
            assert not any(post.journal for post in lifecycle._posts.values()), "a guard stands after a revert"


def _inside(wrapper: Any) -> Any:
    (cell,) = wrapper.__closure__
    return cell.cell_contents


def _check_engine(engine: Any, right: bool, who: str) -> None:
    counted = engine.backward(1.5)
    found = {"keep": engine.values == [1.5], "backward": counted == 1}
    engine.step()  # its window ends here: a revert lets an object finish the window it is in
    assert found == {"keep": right, "backward": right}, f"{who} is repaired: {found}, should be {right}"


def run(sequence: tuple[str, ...]) -> str | None:
    """What is wrong with `sequence`, or None. Runs it in a fork of this interpreter."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _in_child(sequence, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        words = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return words or (f"ended with {status}" if status else None)


def _in_child(sequence: tuple[str, ...], writer: int) -> None:
    done: list[str] = []
    said = sys.stderr = io.StringIO()
    try:
        world = World()
        for event in sequence:
            done.append(event)
            world.do(event)
        lines = said.getvalue().splitlines()
        stray = [line for line in lines if not line.endswith("SI-0001, SI-0002 applied (standin 2.0)")]
        assert not stray, f"said {stray}"
    except BaseException:
        last = traceback.format_exc(limit=-3)
        os.write(writer, f"{' > '.join(done)}:\n{last}{said.getvalue()}".encode())
        os._exit(1)
    os._exit(0)


def main(folder: str, part: str, parts: str) -> None:
    sys.dont_write_bytecode, sys.pycache_prefix = False, f"{folder}/bytecode"  # compiled once, not in every child
    standin.arm(Path(folder))
    importlib.metadata.version("standin")  # warm: it imports the parser of metadata
    gc.freeze()
    wanted = itertools.islice(sequences(), int(part), None, int(parts))
    complaints, count = [], 0
    for sequence in wanted:
        count += 1
        words = run(sequence)
        if words is not None:
            complaints.append(f"{' > '.join(sequence)}\n  failed at {words}")
    print(json.dumps({"ran": count, "complaints": complaints}))


if __name__ == "__main__":
    main(*sys.argv[1:])
