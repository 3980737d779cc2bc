"""Whatever happens in whatever order, everything ends in the same state: the generated sequences, and real races."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import orders
from tests.support import standin

PARTS = 8


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_order_of_four_events_ends_as_the_model_says(part: int, tmp_path: Path) -> None:
    standin.write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.orders", str(tmp_path), str(part), str(PARTS)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(standin.SOURCE), str(standin.ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ran"] > 200
    assert not answer["complaints"], f"{len(answer['complaints'])} of {answer['ran']}, the first:\n" + "\n".join(
        answer["complaints"][:3]
    )


def test_the_sequences_are_those_that_make_sense() -> None:
    found = set(orders.sequences())
    assert len(found) == 1977
    assert {event for sequence in found for event in sequence} == set(orders.EVENTS)
    assert ("import trainfix", "import target", "apply", "revert") in found
    assert ("thread", "import trainfix", "reload core", "revert") in found
    assert ("apply", "import trainfix", "import target", "revert") not in found


def test_a_second_activation_after_apply_under_off_changes_nothing(tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = """
import importlib, trainfix
trainfix.apply("SI-0001")
before = standin.states()
importlib.reload(trainfix)
answer = [before, standin.states()]
"""
    before, after = standin.answer(tmp_path, script, TRAINFIX="off")
    assert before == after == {"SI-0001": "waiting", "SI-0002": "disabled"}


RACE = """
import sys, threading, time

class Slow(dict):
    def __iter__(self):  # what arming walks through: the other thread gets ahead meanwhile
        names = list(super().__iter__())
        time.sleep(0.3)
        return iter(names)

sys.modules["trainfix.engine.targets"].TARGETS = Slow(sys.modules["trainfix.engine.targets"].TARGETS)
import standin.functions
failed = []

def other():
    while not any(type(finder).__module__ == "trainfix.engine.finder" for finder in sys.meta_path):
        time.sleep(0.001)
    time.sleep(DELAY)
    try:
        import standin.core
    except BaseException as error:
        failed.append(repr(error))

thread = threading.Thread(target=other, daemon=True)
thread.start()
import trainfix
thread.join(20)
assert not thread.is_alive(), "the two threads wait for each other"
answer = [failed, standin_states(), standin_works()]
"""


@pytest.mark.parametrize("delay", [0.0, 0.28, 0.295, 0.3, 0.31])
def test_a_thread_may_import_a_target_while_another_imports_trainfix(delay: float, tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = RACE.replace("DELAY", str(delay)).replace("standin_", "support.")
    failed, states, works = standin.answer(tmp_path, "from tests.support import standin as support\n" + script)
    assert failed == []
    assert set(states.values()) == {"applied"}
    assert works == {"total": True, "keep": True, "backward": True}


def test_a_fork_in_the_middle_of_a_change_leaves_no_lock_behind(tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = """
import os, threading, trainfix, standin.core
from tests.support import standin as support
from trainfix.engine import lifecycle
held = threading.Event()
def hold():
    with lifecycle._lock:
        held.set()
        threading.Event().wait(30)
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    trainfix.revert()
    os._exit(0 if set(support.states().values()) == {"reverted"} else 1)
answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert standin.answer(tmp_path, script) == 0


def test_other_import_hooks_on_a_target_go_on_working(tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = """
import wrapt
called = []
wrapt.register_post_import_hook(lambda module: called.append(module.__name__), "standin.core")
import trainfix
wrapt.register_post_import_hook(lambda module: called.append(module.__name__), "standin.functions")
import standin.core
from tests.support import standin as support
answer = [called, support.states(), type(sys.modules["standin.core"].__loader__).__name__]
"""
    called, states, loader = standin.answer(tmp_path, "import sys\n" + script)
    assert sorted(called) == ["standin.core", "standin.functions"]
    assert set(states.values()) == {"applied"}
    assert loader == "SourceFileLoader"


def test_a_private_copy_of_a_target_is_nobodys_business(tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = """
import importlib.util, trainfix, standin
from tests.support import standin as support
spec = importlib.util.find_spec("standin.functions")
copy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy)
answer = [support.states(), copy.total([1, 2, 3])]
"""
    states, total = standin.answer(tmp_path, script)
    assert set(states.values()) == {"waiting"}
    assert total == 4


def test_a_target_that_fails_to_import_may_be_imported_again(tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = """
import os, trainfix
from tests.support import standin as support
os.environ["STANDIN_PLUGIN"] = "no_such_module"
try:
    import standin.core
except ModuleNotFoundError:
    states = support.states()
del os.environ["STANDIN_PLUGIN"]
import standin.core
answer = [states, support.states(), support.works()]
"""
    before, after, works = standin.answer(tmp_path, script)
    assert set(before.values()) == {"waiting"}
    assert set(after.values()) == {"applied"}
    assert all(works.values())


def test_an_upgrade_in_place_is_judged_by_its_own_text_after_a_reload(tmp_path: Path) -> None:
    standin.write(tmp_path)
    script = f"""
import importlib, trainfix, standin.core
from tests.support import standin as support
before = support.states()
support.write(Path({str(tmp_path)!r}), "fixed")
importlib.invalidate_caches()
importlib.reload(standin.functions)
importlib.reload(standin.core)
answer = [before, support.states(), support.works()]
"""
    before, after, works = standin.answer(tmp_path, script, PYTHONDONTWRITEBYTECODE="1")
    assert set(before.values()) == {"applied"}
    assert after == {"SI-0001": "fixed-upstream", "SI-0002": "fixed-upstream"}
    assert works == {"total": True, "keep": True, "backward": False}
