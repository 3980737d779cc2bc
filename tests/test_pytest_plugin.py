"""The pytest plugin: a session whose environment reaches an unrepaired error runs no test; others notice nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.releases import release

pytest_plugins = "pytester"

SOURCE = Path(__file__).resolve().parents[1] / "src"
REACHED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
RIGHT = {**REACHED, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
HEAD = "trainfix: a known training error is reached and not repaired"
TEST = "def test_one():\n    pass\n"
MARKED = "import pytest\n\n@pytest.mark.trainfix(config='ds.json'{more})\ndef test_one():\n    pass\n"


@pytest.fixture(scope="module")
def deepspeed() -> Path:
    """DeepSpeed 0.18.9. It is asked for before pytester gives the tests a home folder, and so a cache, of their own."""
    return release("0.18.9")


@pytest.fixture
def session(deepspeed: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs pytest with the plugin in a folder with one test, as if DeepSpeed 0.18.9 (or nothing) were installed."""

    def run(source: str = TEST, *argv: str, config: object = REACHED, installed: bool = True, name="ds.json"):
        folders = [SOURCE, *([deepspeed] if installed else [])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        pytester.makepyfile(test_one=source)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config))
        return pytester.runpytest_subprocess(
            "-p", "trainfix_pytest", "-p", "no:cacheprovider", "--strict-markers", *argv
        )

    return run


def test_a_marked_session_that_reaches_an_unrepaired_error_fails_before_its_tests(session):
    result = session(MARKED.format(more=""))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text = result.stdout.str()
    for words in (HEAD, "TF-0001", "zero_optimization.stage = 2", "import trainfix", "no test was run"):
        assert words in text
    assert "no tests ran" in text
    assert "passed" not in text


def test_a_marked_session_that_reaches_nothing_runs(session):
    result = session(MARKED.format(more=""), config=RIGHT)
    result.assert_outcomes(passed=1)
    assert HEAD not in result.stdout.str()


def test_an_environment_without_the_packages_runs(session):
    session(MARKED.format(more=""), installed=False).assert_outcomes(passed=1)


def test_allowed_advisories_are_let_pass_and_others_are_not(session):
    allowed = ["TF-0001", "TF-0003", "TF-0004"]
    passing = session(MARKED.format(more=f", allow={allowed}"))
    assert passing.ret == pytest.ExitCode.OK, passing.stdout.str()
    failing = session(MARKED.format(more=", allow='TF-0003'"))
    assert failing.ret == pytest.ExitCode.TESTS_FAILED
    assert "TF-0001" in failing.stdout.str()


def test_a_session_that_imports_trainfix_is_repaired_and_runs(session):
    result = session("import trainfix\n" + MARKED.format(more=""))
    assert result.ret == pytest.ExitCode.OK, result.stdout.str()
    result.assert_outcomes(passed=1)


def test_trainfix_switched_off_repairs_nothing(session, monkeypatch):
    monkeypatch.setenv("TRAINFIX", "off")
    result = session("import trainfix\n" + MARKED.format(more=""))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "TRAINFIX=off" in result.stdout.str()


def test_the_command_line_asks_for_the_whole_session(session):
    assert session(TEST, "--trainfix-config", "ds.json").ret == pytest.ExitCode.TESTS_FAILED
    session(TEST, "--trainfix-config", "ds.json", config=RIGHT).assert_outcomes(passed=1)


def test_the_ini_file_asks_for_the_whole_session_with_paths_beside_it(session, pytester):
    pytester.makeini("[pytest]\ntrainfix_config = configs/ds.json\n")
    result = session(TEST, name="configs/ds.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert HEAD in result.stdout.str()


def test_collecting_asks_nothing(session):
    result = session(MARKED.format(more=""), "--collect-only")
    assert result.ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (MARKED.format(more="").replace("ds.json", "absent.json"), "absent.json"),
        (MARKED.format(more=", allow=['TF-9999']"), "unknown advisory 'TF-9999'"),
        (MARKED.format(more=", alow=['TF-0001']"), "does not take alow; it takes config and allow"),
        (MARKED.format(more="").replace("config=", ""), "does not take arguments without a name"),
    ],
)
def test_a_mistake_is_a_usage_error_that_names_it(session, source, words):
    result = session(source)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert words in result.stderr.str()


def test_what_cannot_be_decided_is_said_and_stops_nothing(session):
    result = session(MARKED.format(more="").replace("config='ds.json'", ""))
    result.assert_outcomes(passed=1)
    assert "trainfix could not decide: " in result.stdout.str()


def test_a_trainfix_that_does_not_start_is_said_and_stops_nothing(session, pytester):
    broken = pytester.path / "trainfix"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('a broken installation')\n")
    result = session(TEST, "--trainfix-config", "ds.json")
    result.assert_outcomes(passed=1)
    assert "trainfix could not decide: RuntimeError: a broken installation" in result.stdout.str()


@pytest.mark.parametrize("how", [["--trainfix-config", "ds.json"], []], ids=["command line", "marker"])
def test_no_test_runs_under_xdist_either(session, how):
    result = session(TEST if how else MARKED.format(more=""), *how, "-p", "xdist", "-n", "1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert HEAD in result.stdout.str()
    assert "TF-0001" in result.stdout.str()
    assert "passed" not in result.stdout.str()


def test_a_session_that_does_not_ask_never_imports_trainfix_nor_starts_a_process(session):
    watched = """
import subprocess, sys

def test_nothing_is_imported():
    assert "trainfix_pytest" in sys.modules
    assert not [name for name in sys.modules if name.split(".")[0] == "trainfix"]
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("trainfix")]
"""
    conftest = "import subprocess\n\ndef refuse(*_, **__):\n    raise AssertionError('a process was started')\n\n"
    watched_and_alone = conftest + "subprocess.run = subprocess.Popen = refuse\n" + watched
    session(watched_and_alone).assert_outcomes(passed=1)


def test_the_entry_point_names_the_plugin():
    import tomllib

    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text())["project"]
    # The two names are the same, so that `-p trainfix_pytest` and the entry point are one plugin to pytest.
    assert project["entry-points"]["pytest11"] == {"trainfix_pytest": "trainfix_pytest"}
    assert (SOURCE / "trainfix_pytest.py").is_file()


def test_the_plugin_alone_imports_nothing_of_trainfix():
    program = "import sys, trainfix_pytest; print([name for name in sys.modules if name.startswith('trainfix.')])"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
