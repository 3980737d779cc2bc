"""Where an error cannot be repaired, the run that reaches it stops, and says what can be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import standin

START = "import trainfix, standin.core\nfrom standin.core import Engine, Other\n"

WORDS = """\
SI-0001 is reached and not repaired: windows lose their middle.
  why it is reached: steps = 4
  why it is not repaired: refused: Engine.check has an unknown body (shape SHAPE) (standin 2.3)
Ways out:
  (1) move to standin 3.0 or newer
  (2) change the configuration: set steps to 1 or 2
  (3) if you have seen that your run is right, set TRAINFIX_DISABLE=SI-0001
TRAINFIX=warn turns this stop into a warning."""


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A release whose errors are known and whose neighbour is not: refused, and proved on its shape."""
    return standin.write(tmp_path, "neighbour")


def stopped(folder: Path, script: str, **env: str) -> str:
    """The words of the UnfixedBugError that `script` ends with."""
    script = "\ntry:\n    " + script.replace("\n", "\n    ") + "\nexcept trainfix.UnfixedBugError as error:\n"
    words: str = standin.answer(folder, START + script + "    answer = str(error)", **env)
    return words


def test_a_run_that_reaches_a_refused_error_stops_and_names_three_ways_out(refused: Path) -> None:
    script = "import re, trainfix.engine.errors as errors, sys\n"
    script += "try:\n    Engine(4)\nexcept errors.UnfixedBugError as e: answer = [str(e), e.advisory]\n"
    words, id = standin.answer(refused, START + script)
    shape = words.partition("(shape ")[2].partition(")")[0]
    assert len(shape) == 12
    assert words == WORDS.replace("SHAPE", shape)
    assert id == "SI-0001"


def test_a_run_that_does_not_reach_it_goes_on(refused: Path) -> None:
    script = "engine = Engine(2); engine.keep(1); engine.keep(2); answer = [engine.step(), engine.boundary(True)]"
    assert standin.answer(refused, START + script) == [3, True]


def test_warn_turns_the_stop_into_one_warning(refused: Path) -> None:
    done = standin.python(refused, START + "Engine(4); Engine(4); print(Engine(4).boundary(False))", TRAINFIX="warn")
    assert done.stdout == "False\n"
    assert done.stderr.count("SI-0001 is reached and not repaired") == 1
    assert done.stderr.count("SI-0002 is reached and not repaired") == 1
    assert "TRAINFIX=warn" not in done.stderr


def test_a_disabled_advisory_is_not_guarded(refused: Path) -> None:
    script = "Engine(4); answer = Engine(2).boundary(False)"
    assert standin.answer(refused, START + script, TRAINFIX_DISABLE="SI-0001,SI-0002") is False
    assert "SI-0002" in stopped(refused, "Engine(4).boundary(False)", TRAINFIX_DISABLE="SI-0001")


def test_an_error_that_only_shows_at_an_event_is_stopped_before_the_event(refused: Path) -> None:
    words = stopped(refused, "engine = Engine(2)\nengine.boundary(is_boundary=False)")
    assert "SI-0002 is reached and not repaired: values are rounded." in words
    assert "why it is reached: boundary(False)" in words


@pytest.mark.parametrize(
    ("severity", "level", "stops"),
    [
        ("gradient", "proved", True),
        ("scale", "proved", True),
        ("precision", "proved", False),
        ("metric", "proved", False),
        ("default", "proved", False),
        ("gradient", "read", False),
        ("scale", "reported", False),
    ],
)
def test_only_a_proved_error_of_gradient_or_scale_stops(severity: str, level: str, stops: bool, tmp_path: Path) -> None:
    folder = standin.write(tmp_path, "neighbour", severity=severity, level=level)
    done = standin.python(folder, START + "Engine(4)")
    assert (done.returncode == 1) is stops
    assert done.stderr.count("SI-0001 is reached and not repaired") == 1


def test_an_unknown_evidence_shape_is_not_proved_and_only_warns(tmp_path: Path) -> None:
    done = standin.python(standin.write(tmp_path, "unknown"), START + "Engine(4)")
    assert done.returncode == 0
    assert "SI-0001 is reached and not repaired" in done.stderr
    assert "refused: standin 2.2: total has an unknown body" in done.stderr


def test_an_object_that_the_repair_does_not_cover_stops_when_it_reaches_the_error(tmp_path: Path) -> None:
    folder = standin.write(tmp_path)
    assert standin.answer(folder, START + "Engine(4); Other(2); answer = True") is True
    words = stopped(folder, "Other(4)")
    assert "SI-0001 is reached and not repaired" in words
    assert "why it is not repaired: the repair does not cover Other (standin 2.0)" in words


def test_an_object_built_before_the_guard_stood_is_seen(refused: Path) -> None:
    before = "import standin.core; engine = standin.core.Engine({})\n"
    done = standin.python(refused, before.format(4) + "import trainfix")
    assert done.returncode == 1
    assert "UnfixedBugError: SI-0001 is reached and not repaired" in done.stderr
    assert standin.python(refused, before.format(2) + "import trainfix").returncode == 0
    warned = standin.python(refused, before.format(4) + "import trainfix", TRAINFIX="warn")
    assert warned.returncode == 0
    assert "SI-0001 is reached and not repaired" in warned.stderr


def test_an_object_built_before_is_repaired_where_the_fix_applies(tmp_path: Path) -> None:
    script = "import standin.core; engine = standin.core.Engine(4)\nimport trainfix\n"
    script += "engine.keep(1.5); answer = engine.values"
    assert standin.answer(standin.write(tmp_path), script) == [1.5]


def test_a_guard_without_a_place_to_stand_is_failed_and_warned_at_import(refused: Path) -> None:
    script = START + "answer = {r.id: [r.state, r.reason] for r in trainfix.status()}\nprint(answer); Engine(4)"
    done = standin.python(refused, script, STANDIN_GUARD="standin.core:Trainer.__init__")
    records = eval(done.stdout)
    assert done.returncode == 0
    state, reason = records["SI-0001"]
    assert state == "failed"
    assert reason.startswith("Engine.check has an unknown body")
    assert reason.endswith("no place to stand guard: standin.core:Trainer.__init__ does not exist")
    assert records["SI-0002"][0] == "refused"
    assert "trainfix: no place to stand guard for SI-0001 at standin.core:Trainer.__init__" in done.stderr
    assert "SI-0001 failed (standin 2.3)" in done.stderr


def test_where_wrapt_is_missing_the_warning_says_how_to_install_it(refused: Path) -> None:
    without = "import sys; sys.modules['wrapt'] = None\n"
    done = standin.python(refused, without + START + "print([r.state for r in trainfix.status()][0])")
    assert done.stdout == "failed\n"
    assert "no place to stand guard for SI-0001" in done.stderr
    assert "it is one of trainfix's requirements: pip install 'wrapt>=1.16'" in done.stderr


def test_a_predicate_that_fails_is_said_and_breaks_nothing(refused: Path) -> None:
    done = standin.python(refused, START + "Engine(4); print('built')", STANDIN_TROUBLE="ask")
    assert done.stdout == "built\n"
    assert "trainfix: cannot tell whether SI-0001 is reached: KeyError: 'steps'" in done.stderr


def test_a_guarded_constructor_keeps_its_signature_and_its_class_its_behaviour(refused: Path) -> None:
    script = """
import inspect, pickle, copy
class Mine(Engine):
    def __init__(self, *, steps):
        super().__init__(steps)
        self.mine = True
engine = Mine(steps=2)
twin = copy.deepcopy(pickle.loads(pickle.dumps(Engine(2))))
answer = [str(inspect.signature(Engine)), str(inspect.signature(Engine.boundary)), engine.mine, twin.steps]
"""
    assert standin.answer(refused, START + script) == ["(steps=4)", "(self, is_boundary)", True, 2]


@pytest.mark.parametrize(
    "intruder",
    [
        "keep = Engine.keep\nEngine.keep = lambda self, value: keep(self, value)",
        "Engine._old_keep = Engine.keep\ndef keep(self, value):\n    self._old_keep(value)\nEngine.keep = keep",
        "def around(old):\n    return lambda self, value: old(self, value)\nEngine.keep = around(Engine.keep)",
        "import functools\nkeep = Engine.keep\nEngine.keep = functools.partialmethod(keep)",
        "def late(self, value, old=Engine.keep):\n    old(self, value)\nEngine.keep = late",
    ],
    ids=["global", "attribute", "closure", "partialmethod", "default"],
)
def test_somebody_who_wraps_the_repair_after_us_is_not_stopped(intruder: str, tmp_path: Path) -> None:
    script = f"{intruder}\nengine = Engine(4)\nengine.keep(1.25)\nanswer = engine.values"
    assert standin.answer(standin.write(tmp_path), START + script) == [1.25]


def test_a_run_whose_repair_somebody_has_undone_since_stops_and_names_who(tmp_path: Path) -> None:
    script = "def intruder(self, value):\n    self.values.append(round(value))\nEngine.keep = intruder\n"
    words = standin.answer(
        standin.write(tmp_path),
        START + script + "try:\n    Engine(4)\nexcept trainfix.UnfixedBugError as error:\n    answer = str(error)",
    )
    assert "why it is not repaired: keep has since been replaced by __main__.intruder" in words
