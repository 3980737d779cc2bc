"""pytest plugin: the tests of a session whose environment reaches a known training error, unrepaired, do not run.

It stands beside the package trainfix and not in it: `import trainfix` repairs what is installed, and a session that
merely has trainfix installed is to stay as it is. For the same reason `trainfix doctor` is asked in a process of its
own, and only where the session asks for it, by the marker, the command line or the ini file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

_REACHED = "trainfix: a known training error is reached and not repaired"
_MARKER = (
    "trainfix(config=FILE, allow=[ID]): no test of the session runs where `trainfix doctor --config FILE` finds an "
    "error that is reached and not repaired. FILE is one or several, relative to the rootdir; the IDs are let pass."
)


@dataclass(frozen=True)
class _Question:
    """What doctor is asked, in the rootdir: the configs of the run, and the advisories that are let pass."""

    configs: tuple[str, ...]
    allowed: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The arguments for trainfix. A session that has imported it by now is repaired by it."""
        configs = [word for config in self.configs for word in ("--config", config)]
        ignored = [word for one in self.allowed for word in ("--ignore", one, "--reason", "allowed by the marker")]
        return ["doctor", *configs, *ignored, *(["--assume-import"] if "trainfix" in sys.modules else [])]


@dataclass(frozen=True)
class _Answer:
    """What doctor said. `code` is one of its documented exit codes."""

    code: int
    report: str
    complaint: str


_FOUND = pytest.StashKey[str]()  # on a worker of pytest-xdist, why no test runs


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "a config of the training run; the session fails where it reaches a known training error, unrepaired"
    group = parser.getgroup("trainfix")
    group.addoption("--trainfix-config", action="append", default=[], metavar="FILE", help=f"{about} (repeatable)")
    parser.addini("trainfix_config", f"{about} (one or more, relative to this file)", type="paths", default=[])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    reports = []
    for question in dict.fromkeys(_questions(session)):
        answer = _ask(question, session.config)
        if answer.code == 1:
            reports.append(answer.report)
        elif answer.code == 2:
            raise pytest.UsageError(answer.complaint)
        elif answer.code:
            _say(session.config, f"trainfix could not decide: {answer.complaint or _last_line(answer.report)}")
    if not reports:
        return
    if _on_worker(session.config):  # its loop belongs to the controller, and a test is all that it can report on
        session.config.stash[_FOUND] = "\n".join([f"{_REACHED}, so no test runs", *reports])
        return
    _say(session.config, *reports, title=_REACHED)
    session.shouldfail = f"{_REACHED} (see above): no test was run"
    raise session.Failed(session.shouldfail)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    found = item.config.stash.get(_FOUND, None)
    if found is not None:
        pytest.fail(found, pytrace=False)


def _questions(session: pytest.Session) -> Iterator[_Question]:
    config = session.config
    given = [config.invocation_params.dir / file for file in config.getoption("--trainfix-config")]
    given += config.getini("trainfix_config")
    if given and not _on_worker(config):
        yield _Question(tuple(os.path.relpath(file, config.rootpath) for file in given))
    for item in session.items:
        for marker in item.iter_markers("trainfix"):
            yield _of_marker(marker, item)


def _of_marker(marker: pytest.Mark, item: pytest.Item) -> _Question:
    unknown = marker.kwargs.keys() - {"config", "allow"}
    if marker.args or unknown:
        wrong = ", ".join(sorted(unknown)) or "arguments without a name"
        raise pytest.UsageError(
            f"{item.nodeid}: @pytest.mark.trainfix does not take {wrong}; it takes config and allow"
        )
    configs, allowed = (_several(marker.kwargs.get(key, ())) for key in ("config", "allow"))
    return _Question(configs, allowed)


def _several(value: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """One value or several, as texts."""
    return tuple(os.fspath(one) for one in ([value] if isinstance(value, (str, os.PathLike)) else value))


def _ask(question: _Question, config: pytest.Config) -> _Answer:
    """Let doctor examine what these tests would import."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "trainfix", *question.command()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=config.rootpath,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 1 and not done.stdout:  # Python's own code for a program that failed
        return _Answer(3, "", _last_line(done.stderr))
    return _Answer(done.returncode, done.stdout, done.stderr.strip())


def _say(config: pytest.Config, *paragraphs: str, title: str = "") -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    reporter.ensure_newline()
    if title:
        reporter.section(title, sep="!", red=True)
    for line in "\n".join(paragraphs).splitlines():
        reporter.write_line(line)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _on_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")  # given by pytest-xdist
