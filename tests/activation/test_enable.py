"""``trainfix enable`` and ``disable``: one line in a file of the environment, which never harms an interpreter."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.activation import children
from tests.activation.children import SAY, package, python, without_trainfix
from trainfix.activation.found import active_in, enabled_files
from trainfix.cli.enable import LINE

CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


class Environment:
    """A virtual environment with trainfix in it."""

    def __init__(self, folder: Path, *, wheel: bool = False) -> None:
        self.folder = folder
        self.python, self.site = children.environment(folder / "venv", wheel=wheel)
        self.file = self.site / "trainfix_enable.pth"
        self.env = without_trainfix(package(folder / "packages"))

    def trainfix(self, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [self.python, "-m", "trainfix", *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]

    def says(self) -> str:
        """What a Python of the environment says of itself."""
        return python("-c", SAY, env=self.env, program=self.python)


@pytest.fixture(params=["wheel", "editable"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> Environment:
    """An environment with a wheel, and one with an editable install."""
    return Environment(tmp_path, wheel=request.param == "wheel")


@pytest.fixture
def linked(tmp_path: Path) -> Environment:
    """An environment with an editable install."""
    return Environment(tmp_path)


def test_enable_makes_every_python_of_the_environment_active_and_disable_undoes_it(environment: Environment) -> None:
    assert environment.says() == "not active\n"
    done = environment.trainfix("enable")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {environment.file}:\n{LINE}")
    assert "TRAINFIX=off" in done.stdout and "`trainfix disable` removes the file" in done.stdout
    assert environment.file.read_text() == LINE and LINE.count("\n") == 1 and LINE.isascii()
    assert environment.says() == "active\n"
    done = environment.trainfix("disable")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"removed {environment.file}: ")
    assert environment.says() == "not active\n"


def test_doing_either_twice_is_doing_it_once(linked: Environment) -> None:
    linked.trainfix("enable")
    before = linked.file.stat().st_mtime_ns
    done = linked.trainfix("enable")
    assert (done.returncode, done.stdout) == (0, f"already enabled: {linked.file} is as it should be\n")
    assert linked.file.stat().st_mtime_ns == before
    linked.trainfix("disable")
    done = linked.trainfix("disable")
    assert (done.returncode, done.stdout) == (0, f"nothing to remove: there is no {linked.file}\n")


def test_a_file_of_another_release_is_renewed(linked: Environment) -> None:
    linked.file.write_text("import sys\n")
    assert linked.trainfix("enable").stdout.startswith(f"renewed {linked.file}:\n")
    assert linked.file.read_text() == LINE


def test_no_other_file_is_left(linked: Environment) -> None:
    before = set(os.listdir(linked.site))
    linked.trainfix("enable")
    assert set(os.listdir(linked.site)) - before == {"trainfix_enable.pth"}


def test_it_imports_nothing_of_trainfix_before_a_package_to_repair(linked: Environment) -> None:
    linked.trainfix("enable")
    script = "import sys; print(sorted(name for name in sys.modules if 'trainfix' in name), *sys.path, sep='\\n')"
    loaded, *path = python("-c", script, env=linked.env, program=linked.python).splitlines()
    assert loaded == "['_trainfix_waiting']"
    assert not [entry for entry in path if "bootstrap" in entry]


def test_off_is_off(linked: Environment) -> None:
    linked.trainfix("enable")
    linked.env["TRAINFIX"] = "off"
    assert linked.says() == "not active\n"


def test_an_uninstalled_trainfix_leaves_a_line_that_does_nothing(tmp_path: Path) -> None:
    environment = Environment(tmp_path, wheel=True)
    environment.trainfix("enable")
    shutil.rmtree(environment.site / "trainfix")
    assert environment.says() == "not active\n"
    assert active_in([str(environment.site)], {}) is None


def test_an_upgrade_and_a_move_of_the_environment_leave_it_active(tmp_path: Path) -> None:
    environment = Environment(tmp_path, wheel=True)
    environment.trainfix("enable")
    shutil.rmtree(environment.site / "trainfix")
    (environment.site / "_trainfix.pth").write_text(f"{children.SOURCE}\n")
    assert environment.says() == "active\n"
    (tmp_path / "venv").rename(tmp_path / "moved")
    assert python("-c", SAY, env=environment.env, program=tmp_path / "moved" / "bin" / "python") == "active\n"


def test_a_broken_trainfix_is_one_line_on_stderr(tmp_path: Path) -> None:
    environment = Environment(tmp_path, wheel=True)
    environment.trainfix("enable")
    (environment.site / children.INSIDE / "_trainfix_waiting.py").write_text("raise RuntimeError('two\\nlines')")
    command = [environment.python, "-c", "print('went on')"]
    done = subprocess.run(command, env=environment.env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert done.stderr == "trainfix: not active in this process: RuntimeError('two\\nlines')\n"


def test_enabled_and_below_run_is_active_once(linked: Environment) -> None:
    linked.trainfix("enable")
    script = f"{SAY}; import sys; print(sum(type(one).__name__ == 'Waiting' for one in sys.meta_path))"
    done = linked.trainfix("run", "--", str(linked.python), "-c", script)
    assert (done.returncode, done.stdout) == (0, "active\n1\n"), done.stderr


# Refusals.


def test_a_python_that_is_no_environment_is_refused(tmp_path: Path) -> None:
    interpreter = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    env = without_trainfix(children.SOURCE)
    done = subprocess.run(
        [interpreter, "-m", "trainfix", "enable"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"trainfix: {sys.base_prefix} is ")
    assert "use `trainfix run -- COMMAND`, which writes nothing, or enable a venv" in done.stderr


SYSTEM = """
import sys, sysconfig
sys.base_prefix = sys.prefix
real = sysconfig.get_path
sysconfig.get_path = lambda name, *rest: {stdlib!r} if name == "stdlib" else real(name, *rest)
sys.argv[0] = "trainfix"
from trainfix.cli import main
sys.exit(main([{command!r}]))
"""


def as_system(environment: Environment, command: str) -> subprocess.CompletedProcess[str]:
    """The command in this environment, as if its Python were no virtual environment's."""
    script = SYSTEM.format(stdlib=str(environment.folder), command=command)
    words = [environment.python, "-c", script]
    return subprocess.run(words, env=environment.env, capture_output=True, text=True, check=False)


def test_an_externally_managed_python_is_refused_even_with_conda(linked: Environment) -> None:
    (linked.folder / "EXTERNALLY-MANAGED").touch()
    (linked.folder / "venv" / "conda-meta").mkdir()
    done = as_system(linked, "enable")
    assert (done.returncode, done.stdout) == (1, "")
    marker = linked.folder / "EXTERNALLY-MANAGED"
    assert f"is managed by the system ({marker} says so): use `trainfix run -- COMMAND`" in done.stderr
    assert not linked.file.exists()


def test_a_conda_environment_is_enabled(linked: Environment) -> None:
    assert as_system(linked, "enable").returncode == 1
    (linked.folder / "venv" / "conda-meta").mkdir()
    done = as_system(linked, "enable")
    assert (done.returncode, linked.file.read_text()) == (0, LINE), done.stderr


def test_an_environment_without_trainfix_is_refused(linked: Environment) -> None:
    (linked.site / "_trainfix.pth").unlink()
    linked.env["PYTHONPATH"] = str(children.SOURCE)
    done = linked.trainfix("enable")
    assert done.returncode == 1
    assert f"trainfix is not installed in {linked.site}: install it there first, or use `trainfix run" in done.stderr
    assert not linked.file.exists()


def without_power() -> None:
    """In a child: the permissions of files hold for root too."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_an_environment_that_cannot_be_written_is_refused_and_left_as_it_is(linked: Environment) -> None:
    before = set(os.listdir(linked.site))
    linked.site.chmod(0o555)
    try:
        done = linked.trainfix("enable", preexec_fn=without_power)
    finally:
        linked.site.chmod(0o755)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"trainfix: {linked.site} cannot be written: use `trainfix run -- COMMAND`, which writes nothing\n"
    )
    assert set(os.listdir(linked.site)) == before


def test_a_file_that_cannot_be_removed_is_named(linked: Environment) -> None:
    linked.trainfix("enable")
    linked.site.chmod(0o555)
    try:
        done = linked.trainfix("disable", preexec_fn=without_power)
    finally:
        linked.site.chmod(0o755)
    assert done.returncode == 1
    assert f"{linked.file} cannot be removed (Permission denied); remove it yourself" in done.stderr
    assert linked.file.exists()


def test_something_else_under_the_files_name_is_left_alone(linked: Environment) -> None:
    linked.file.mkdir()
    for command in ("enable", "disable"):
        done = linked.trainfix(command)
        assert done.returncode == 1
        assert f"{linked.file} cannot be" in done.stderr and "(Is a directory)" in done.stderr
    assert linked.file.is_dir()


def test_neither_takes_an_argument(linked: Environment) -> None:
    assert linked.trainfix("enable", "now").returncode == 2
    assert linked.trainfix("disable", "--all").returncode == 2


# What doctor asks.


def test_found_in_an_environment_that_is_enabled(environment: Environment) -> None:
    site = [str(environment.site)]
    assert (active_in(site, {}), enabled_files(site)) == (None, [])
    environment.trainfix("enable")
    assert active_in(site, {}) == "trainfix enable"
    assert enabled_files(["", "nowhere", *site]) == [str(environment.file)]


def test_found_below_run_and_only_while_the_folder_is_there(tmp_path: Path) -> None:
    bootstrap = tmp_path / children.INSIDE
    below = {"PYTHONPATH": os.pathsep.join(["/first", str(bootstrap)])}
    assert active_in([], below) is None
    bootstrap.mkdir(parents=True)
    (bootstrap / "sitecustomize.py").touch()
    assert active_in([], below) == "trainfix run"
    assert active_in([], {}) is None


@pytest.mark.parametrize(
    "content", [b"", b"# import _trainfix_waiting\n", b"_trainfix_waiting\n", b"\xff\xfe\x00import\n", b"\0/x\n"]
)
def test_a_start_up_file_that_does_nothing_of_ours_is_not_counted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "trainfix_enable.pth").write_bytes(content)
    assert enabled_files([str(tmp_path)]) == []
    assert active_in([str(tmp_path)], {}) is None


def test_looking_executes_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})\n")
    (tmp_path / "trainfix_enable.pth").write_text(LINE)
    assert active_in([str(tmp_path)], {}) is None
    assert not (tmp_path / "executed").exists()


def test_the_environment_of_the_tests_is_not_enabled() -> None:
    assert enabled_files([sysconfig.get_path("purelib")]) == []
