"""``trainfix run``: every Python below it is active, and nothing else about it changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.activation import children
from tests.activation.children import ACTIVE, BOOTSTRAP, SAY, SOURCE, below_run, package, python, without_trainfix
from trainfix.activation import launch
from trainfix.cli import main
from trainfix.engine.targets import TARGETS

BASE = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty package to repair on its path."""
    return without_trainfix(package(tmp_path / "packages"))


# Active everywhere below.


def test_a_python_is_active_when_it_imports_a_package_to_repair(env: dict[str, str]) -> None:
    done = below_run(sys.executable, "-c", SAY, env=env)
    assert (done.returncode, done.stdout) == (0, "active\n"), done.stderr


def test_without_run_it_is_not(env: dict[str, str]) -> None:
    assert python("-c", SAY, env=env) == "not active\n"


def test_until_then_it_has_imported_nothing_of_trainfix(env: dict[str, str]) -> None:
    script = "import sys; print(sorted(name for name in sys.modules if 'trainfix' in name))"
    assert below_run(sys.executable, "-c", script, env=env).stdout == "['_trainfix_waiting']\n"


def test_the_packages_waited_for_are_those_of_the_engine() -> None:
    script = "import _trainfix_waiting; print(*sorted(_trainfix_waiting.PACKAGES))"
    found = python("-c", script, env=without_trainfix(Path(BOOTSTRAP))).split()
    assert found == sorted({"torch", *(name.partition(".")[0] for name in TARGETS)})


def test_scripts_modules_and_children_of_children_are_active(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "packages" / "say.py").write_text(SAY)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAY!r}], check=True)"
    for words in (["say.py"], ["-m", "say"], ["-c", child]):
        done = below_run(sys.executable, *words, env=env, cwd=tmp_path / "packages")
        assert (done.returncode, done.stdout) == (0, "active\n"), (words, done.stderr)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_processes_of_multiprocessing_are_active(method: str, env: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing\n"
        f"def say(_):\n    import trl\n    return {ACTIVE}\n"
        "if __name__ == '__main__':\n"
        f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n        print(pool.map(say, range(2)))\n"
    )
    done = below_run(sys.executable, script, env=env)
    assert (done.returncode, done.stdout) == (0, "[True, True]\n"), done.stderr


def test_two_threads_that_import_two_packages_at_once_are_both_seen(env: dict[str, str], tmp_path: Path) -> None:
    package(tmp_path / "more")
    (tmp_path / "more" / "trl").rename(tmp_path / "packages" / "torchao")
    script = (
        "import sys, threading\n"
        "sys.setswitchinterval(1e-6)\n"
        "go = threading.Barrier(2)\n"
        "def bring(name):\n    go.wait()\n    __import__(name)\n"
        "threads = [threading.Thread(target=bring, args=(name,)) for name in ('trl', 'torchao')]\n"
        "[thread.start() for thread in threads]; [thread.join(30) for thread in threads]\n"
        "from trainfix.engine import register\n"
        "print(sorted(register.executed))\n"
    )
    assert below_run(sys.executable, "-c", script, env=env).stdout == "['torchao', 'trl']\n"


def test_a_script_that_imports_trainfix_itself_is_active_once(env: dict[str, str]) -> None:
    script = f"import trainfix; {SAY}; import sys; print(sum(type(one).__name__ == 'Finder' for one in sys.meta_path))"
    assert below_run(sys.executable, "-c", script, env=env).stdout == "active\n1\n"


# Another environment.


def test_an_environment_without_trainfix_gets_it_and_nothing_else_of_its_folder(tmp_path: Path) -> None:
    _, site = children.environment(tmp_path / "ours", wheel=True)
    (site / "neighbour.py").touch()
    venv.create(tmp_path / "theirs", symlinks=True)
    run, bare = [tmp_path / "ours/bin/python", "-m", "trainfix", "run", "--"], tmp_path / "theirs/bin/python"
    script = (
        f"{SAY}; import trainfix; print(trainfix.__file__)\ntry: import neighbour\nexcept ImportError: print('none')"
    )
    env = without_trainfix(package(tmp_path / "packages"))
    done = subprocess.run([*run, bare, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"active\n{site}/trainfix/__init__.py\nnone\n", done.stderr
    assert done.stderr == ""


def test_an_environment_with_a_trainfix_of_its_own_keeps_it(tmp_path: Path) -> None:
    interpreter, site = children.environment(tmp_path / "theirs", wheel=True)
    env = without_trainfix(package(tmp_path / "packages"))
    done = below_run(interpreter, "-c", f"{SAY}; import trainfix; print(trainfix.__file__)", env=env)
    assert done.stdout == f"active\n{site}/trainfix/__init__.py\n", done.stderr


def test_a_folder_that_is_called_trainfix_is_not_taken_for_it(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "trainfix").mkdir()
    assert below_run(sys.executable, "-c", SAY, env=env, cwd=tmp_path).stdout == "active\n"


@pytest.fixture
def old_python() -> Path:
    """A Python older than 3.10 that is installed beside this one, as pyenv does; this one if there is none."""
    found = sorted(Path(sys.base_prefix).parent.glob("3.[6789].*/bin/python3"))
    return found[0] if found else BASE


def test_a_python_too_old_for_trainfix_runs_and_says_so_in_one_line(
    env: dict[str, str], old_python: Path, tmp_path: Path
) -> None:
    """Where there is no old one, the user's sitecustomize makes this one look old."""
    if old_python == BASE:
        (tmp_path / "packages" / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 8, 0)")
    done = below_run(old_python, "-c", "import trl; import trl.__init__; print('went on')", env=env)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("trainfix: not active in this process: Python 3.")
    assert lines[0].endswith("is too old, 3.10 is needed")


# Settings.


def test_off_is_off(env: dict[str, str]) -> None:
    done = below_run(sys.executable, "-c", SAY, env=env | {"TRAINFIX": "off"})
    assert (done.stdout, done.stderr) == ("not active\n", "")


def test_a_setting_that_means_nothing_is_refused_before_the_command_starts(env: dict[str, str]) -> None:
    done = below_run("echo", "started", env=env | {"TRAINFIX": "oof"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRAINFIX='oof' means nothing; valid: on, off, warn, strict" in done.stderr


def test_such_a_setting_made_below_stops_the_import_and_not_the_interpreter(env: dict[str, str]) -> None:
    script = "print('started')\ntry: import trl\nexcept ValueError as error: print(error)"
    done = below_run("env", "TRAINFIX=oof", sys.executable, "-c", script, env=env)
    assert done.stdout == "started\nTRAINFIX='oof' means nothing; valid: on, off, warn, strict\n"


# The user's own sitecustomize.


def customised(folder: Path, text: str) -> dict[str, str]:
    """An environment with a sitecustomize of the user's, and with the package to repair."""
    package(folder)
    (folder / "sitecustomize.py").write_text(text)
    return without_trainfix(folder)


def test_the_users_sitecustomize_runs_and_is_the_module_of_that_name(tmp_path: Path) -> None:
    env = customised(tmp_path, "import sys; sys.path.append('added')")
    script = f"{SAY}; import sitecustomize, sys; print(sitecustomize.__file__, sys.path[-1])"
    done = below_run(sys.executable, "-c", script, env=env)
    assert (done.stdout, done.stderr) == (f"active\n{tmp_path}/sitecustomize.py added\n", "")


@pytest.mark.parametrize(
    "text",
    [
        "raise ValueError('mine')",
        "import nowhere",
        "raise SystemExit(5)",
        "raise KeyboardInterrupt",
        "def f(:",
        "import sys; print(sys.path, sys.modules['sitecustomize'].__file__, __name__)",
    ],
)
def test_what_the_users_sitecustomize_does_wrong_ends_as_it_would_without_us(text: str, tmp_path: Path) -> None:
    env = customised(tmp_path, text)
    words = [sys.executable, "-c", "import sys; print('went on', 'sitecustomize' in sys.modules)"]
    plain = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    below = subprocess.run(words, env=launch.environment(env), capture_output=True, text=True, check=False)
    assert (below.returncode, below.stdout) == (plain.returncode, plain.stdout)
    assert below.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


def test_a_second_bootstrap_does_not_send_the_first_in_a_circle(env: dict[str, str], tmp_path: Path) -> None:
    interpreter, _ = children.environment(tmp_path / "other", wheel=True)
    done = below_run(interpreter, "-m", "trainfix", "run", sys.executable, "-c", SAY, env=env)
    assert (done.returncode, done.stdout) == (0, "active\n"), done.stderr


# Nothing of ours breaks the start of an interpreter.


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("_trainfix_waiting.py", "raise RuntimeError('two\\nlines')"),
        ("_trainfix_waiting.py", "def f(:"),
        ("_trainfix_waiting.py", None),
        ("../../__init__.py", "raise RuntimeError('two\\nlines')"),
        ("../../settings.py", None),
    ],
)
def test_a_broken_trainfix_is_one_line_on_stderr(file: str, text: str | None, tmp_path: Path) -> None:
    _, site = children.environment(tmp_path / "broken", wheel=True)
    bootstrap = site / children.INSIDE
    if text is None:
        (bootstrap / file).unlink()
    else:
        (bootstrap / file).write_text(text)
    env = without_trainfix(bootstrap, package(tmp_path / "packages"))
    for _ in range(2):
        done = subprocess.run(
            [BASE, "-c", "import trl; import trl; print('went on')"],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "went on\n")
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("trainfix: not active in this process: ")


# The command.


def test_the_command_takes_the_place_of_trainfix_with_its_exit_code_and_signals(env: dict[str, str]) -> None:
    assert below_run("sh", "-c", "exit 7", env=env).returncode == 7
    assert below_run("sh", "-c", "kill -TERM $$", env=env).returncode == -signal.SIGTERM
    script = [sys.executable, "-m", "trainfix", "run", "sh", "-c", "echo $$; exec cat"]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert int(started.stdout.readline()) == started.pid
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == -signal.SIGINT


def test_signals_that_python_ignores_are_not_ignored_by_the_command(env: dict[str, str]) -> None:
    done = below_run("sh", "-c", "grep SigIgn /proc/self/status", env=env)
    assert int(done.stdout.split()[1], 16) & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0


def test_arguments_reach_the_command_as_they_are(env: dict[str, str]) -> None:
    for words in (["--version", "--", "a b", "-h", "", "--format=json"], ["--", "x"]):
        script = "import sys; print(sys.argv[1:])"
        assert below_run(sys.executable, "-c", script, *words, env=env).stdout == f"{words}\n"
    bare = [sys.executable, "-m", "trainfix", "run", "echo", "without", "--", "dashes"]
    assert subprocess.run(bare, capture_output=True, text=True, check=True).stdout == "without -- dashes\n"


@pytest.mark.parametrize("argv", [["run"], ["run", "--"]])
def test_no_command_is_a_mistake_with_an_example(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "trainfix run needs a command" in capsys.readouterr().err


def test_a_command_that_does_not_exist_or_cannot_start_is_named(env: dict[str, str], tmp_path: Path) -> None:
    done = below_run("no-such-command", "x", env=env)
    assert (done.returncode, done.stderr) == (127, "trainfix run: 'no-such-command': there is no such command\n")
    script = tmp_path / "train.py"
    script.touch()
    done = below_run(script, env=env)
    assert done.returncode == 126
    assert "cannot be started: Permission denied" in done.stderr
    assert f"trainfix run -- python {script}" in done.stderr


def test_the_folder_stands_on_the_path_once_and_the_users_entries_stay() -> None:
    once = launch.environment({"PYTHONPATH": "/a::/b", "X": "1"})
    assert once == {"PYTHONPATH": os.pathsep.join([BOOTSTRAP, "/a", "", "/b"]), "X": "1"}
    assert launch.environment(once) == once
    assert launch.environment({}) == launch.environment({"PYTHONPATH": ""}) == {"PYTHONPATH": BOOTSTRAP}


# Warnings.


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python -I x.py", ["-I"]),
        ("/usr/bin/python3.11 -Is x.py", ["-I"]),
        ("env A=1 python3 -u -W error -X dev -SE -m x", ["-E", "-S"]),
        ("python3.13t -Wignore -bbS -c pass", ["-S"]),
        ("python -ISc pass", ["-I", "-S"]),
        ("python --check-hash-based-pycs always -E", ["-E"]),
        ("python x.py -I", []),
        ("python -mIES", []),
        ("python -c E -I", []),
        ("python -uc E -I", []),
        ("python -XIES x.py", []),
        ("python - -I", []),
        ("torchrun -I x.py", []),
        ("python", []),
    ],
)
def test_an_option_that_keeps_python_from_looking_at_us_is_named(command: str, options: list[str]) -> None:
    found = launch.warnings(command.split(), {})
    assert [text.split()[0] for text in found] == options
    assert all("trainfix will not be active: leave it out, or put `import trainfix`" in text for text in found)


def test_the_warning_tells_the_truth(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text(f"import sys; sys.path.insert(0, {str(tmp_path / 'packages')!r}); {SAY}")
    for option in ("-I", "-E", "-S"):
        done = below_run(sys.executable, option, tmp_path / "say.py", env=env)
        assert done.stdout == "not active\n"
        assert done.stderr.startswith(f"trainfix: {option} ")


def test_deepspeed_with_a_hostfile_needs_the_folder_and_the_settings_on_every_node(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.touch()
    environ = {"TRAINFIX": "warn", "TRAINFIX_DISABLE": "TF-0001", "TRAINFIXED": "1"}
    for words in (["-H", str(hosts)], ["--hostfile", str(hosts)], [f"--hostfile={hosts}"]):
        node, settings = launch.warnings(["deepspeed", *words, "train.py"], environ)
        assert f"the nodes of {hosts}" in node and BOOTSTRAP in node
        assert "does not hand TRAINFIX=warn TRAINFIX_DISABLE=TF-0001 on" in settings
        assert "~/.deepspeed_env" in settings
        assert len(launch.warnings(["deepspeed", *words, "train.py"], {})) == 1
    assert launch.warnings(["deepspeed", "--hostfile", str(tmp_path / "none"), "train.py"], environ) == []
    assert launch.warnings(["deepspeed", "--num_gpus", "2", "train.py"], environ) == []
    assert launch.warnings(["torchrun", "--hostfile", str(hosts)], environ) == []


def test_a_ray_job_is_not_below_the_command_that_submits_it() -> None:
    (text,) = launch.warnings(["ray", "job", "submit", "--", "python", "train.py"], {})
    assert "ray job submit [OPTIONS] -- trainfix run -- COMMAND" in text


def test_the_checkout_is_what_is_tested() -> None:
    assert Path(BOOTSTRAP).is_relative_to(SOURCE)
