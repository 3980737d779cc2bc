"""The command line as a whole: mistakes, list, show, diff, colour, and what it costs."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import trainfix as package
from tests.support.releases import RELEASES, release
from trainfix.advisories import load_all
from trainfix.cli import base

SOURCE = Path(package.__file__).parent.parent
BUDGET = 0.3  # seconds of CPU over a bare interpreter


def environment(*folders: str | Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, *folders)))}


def shell(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainfix", *argv]
    return subprocess.run(command, env=env or environment(), capture_output=True, text=True, check=False)


# Mistakes: the nearest word, the valid ones, exit 2, no traceback.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["doctr"], ["unknown command 'doctr'", "did you mean doctor?", "doctor, prove, xray, list, show, diff"]),
        (["doctor", "--confg", "ds.json"], ["unknown option '--confg'", "did you mean --config?", "--assume-import"]),
        (["doctor", "--conf", "ds.json"], ["unknown option '--conf'", "did you mean --config?"]),
        (["prove", "--fromat=json"], ["unknown option '--fromat'", "did you mean --format?"]),
        (["--verison"], ["unknown option '--verison'", "did you mean --version?"]),
        (["doctor", "ds.json"], ["`trainfix doctor` does not take 'ds.json'"]),
        (["doctor", "--only", "TF0001"], ["--only", "unknown advisory 'TF0001'", "did you mean TF-0001?", "TF-0003"]),
        (["prove", "TF-9999"], ["unknown advisory 'TF-9999'", "valid: TF-0001"]),
        (["show", "nonsense"], ["unknown advisory 'NONSENSE'", "valid: TF-0001"]),
        (["doctor", "--format", "jsn"], ["unknown format 'jsn'", "did you mean json?", "text, json"]),
        (["show"], ["required", "ID"]),
        (["doctor", "--config"], ["--config", "expected one argument"]),
        (["diff", "TF-0001", "--for", "0.18.9"], ["--for 0.18.9", "concerns deepspeed", "deepspeed==0.18.9"]),
        (["diff", "TF-0001", "--for", "torch==2.13.0"], ["concerns deepspeed", "deepspeed==0.18.9"]),
        (["diff", "TF-0001", "--for", "deepspeed==new"], ["names no release", "deepspeed==0.18.9"]),
        (["diff", "TF-0001", "--for", "deepspeed==0.19.8"], ["no source patch for deepspeed 0.19.8", "<=0.18.9"]),
    ],
)
def test_a_mistake_names_the_nearest_and_the_valid(trainfix, argv, words):
    answer = trainfix(*argv)
    assert (answer.code, answer.out) == (2, "")
    for word in words:
        assert word in answer.err


def test_no_command_is_a_mistake_that_shows_the_commands(trainfix):
    answer = trainfix()
    assert answer.code == 2
    for command in ("doctor", "prove", "list", "show", "diff"):
        assert command in answer.out


# The catalogue.


def test_list_names_every_advisory(trainfix):
    answer = trainfix("list")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert len(lines) == len(load_all())
    assert re.match(r"TF-0001  deepspeed 0\.15\.2 to 0\.18\.9 +gradient +ZeRO-2 with CPU offload drops", lines[0])


@pytest.mark.parametrize("advisory", load_all(), ids=lambda one: one.id)
def test_show_explains_one_advisory(trainfix, advisory):
    answer = trainfix("show", advisory.id.lower())
    assert answer.code == 0
    text = " ".join(answer.out.split())
    for words in (advisory.summary, *advisory.details.split(), *advisory.ways_out["config"].split()):
        assert words in text
    for _, url in advisory.references:
        assert url in text
    release, package = advisory.ways_out["upgrade"], advisory.package
    assert (f"upgrade: to {package} {release}" if release else f"no release of {package} repairs it yet") in text
    changes = package == "deepspeed" and release is not None and advisory.affected[-1] < "0.19.3"
    assert ("gradient_clipping in 0.19.3" in text) == changes
    assert (f"proof: trainfix prove {advisory.id}" if advisory.proof else "proof: none") in text


@pytest.mark.parametrize("version", ["0.15.2", "0.18.2", "0.18.3", "0.18.9"])
def test_diff_is_the_source_patch_of_the_release(trainfix, version):
    answer = trainfix("diff", "TF-0001", "--for", f"deepspeed=={version}")
    assert answer.code == 0
    assert answer.out.startswith("--- a/deepspeed/runtime/zero/stage_1_and_2.py\n+++ b/")
    assert answer.out == trainfix("diff", "TF-0001", installed=version).out


def test_diff_needs_to_know_the_release(trainfix):
    answer = trainfix("diff", "TF-0001", installed=None)
    assert answer.code == 2
    assert "deepspeed is not installed: say for which release, --for deepspeed==0.18.9" in answer.err


def test_every_affected_release_has_a_source_patch_where_there_are_any(trainfix):
    for advisory in load_all():
        for version in set(advisory.affected) & set(RELEASES) if advisory.source_patches else ():
            assert trainfix("diff", advisory.id, "--for", f"deepspeed=={version}", installed=None).code == 0


def test_an_advisory_that_we_only_know_says_what_there_is_not(trainfix, catalogue):
    catalogue("TF-0014", ways_out={"upgrade": None, "config": "do something else"}, evidence={}, triggers=[])
    text = " ".join(trainfix("show", "TF-0014").out.split())
    for words in (
        "evidence: read reached if: every run reaches it repair: none yet",
        "upgrade: no release of deepspeed repairs it yet config: do something else proof: none",
    ):
        assert words in text
    for argv in (("diff", "TF-0014"), ("diff", "TF-0014", "--for", "deepspeed==0.18.9")):
        answer = trainfix(*argv, installed=None)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err == "trainfix: TF-0014 has no source patch; `trainfix show TF-0014` has the ways out\n"


# A damaged trainfix.


@pytest.fixture
def damaged(tmp_path):
    """A copy of the package whose record of TF-0001 was altered by a function on its text."""
    import shutil

    def copied(alter) -> dict[str, str]:
        shutil.copytree(SOURCE / "trainfix", tmp_path / "trainfix", ignore=shutil.ignore_patterns("__pycache__"))
        record = tmp_path / "trainfix/advisories/records/TF-0001.json"
        record.write_text(alter(record.read_text()))
        return {**os.environ, "PYTHONPATH": str(tmp_path)}

    return copied


@pytest.mark.parametrize("argv", [("doctor",), ("list",), ("doctor", "--only", "TF-0001"), ("show", "TF-0001")])
def test_a_truncated_record_is_named(damaged, tmp_path, argv):
    answer = shell(*argv, env=damaged(lambda text: text[: len(text) // 2]))
    assert (answer.returncode, answer.stdout) == (3, "")
    assert f"cannot read the record {tmp_path}/trainfix/advisories/records/TF-0001.json" in answer.stderr
    assert "pip install --force-reinstall" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_record_without_a_key_is_named_with_the_key(damaged):
    answer = shell("doctor", env=damaged(lambda text: text.replace('"severity"', '"gravity"')))
    assert answer.returncode == 3
    assert "TF-0001.json is incomplete (KeyError: 'severity')" in answer.stderr
    assert "Traceback" not in answer.stderr


# The program as users start it.


def test_module_and_version():
    for argv in (["--version"], ["doctor", "--version"], ["diff", "--version"]):
        answer = shell(*argv)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"trainfix {package.__version__}\n", "")


def test_help_says_what_the_exit_codes_mean():
    answer = shell("doctor", "--help")
    assert answer.returncode == 0
    assert "1 something reachable is not repaired; 2 usage; 3 could not decide" in " ".join(answer.stdout.split())


def test_a_reader_who_leaves_early_is_no_error():
    command = [sys.executable, "-m", "trainfix", "show", "TF-0001"]
    read, written = os.pipe()
    os.close(read)
    answer = subprocess.run(command, env=environment(), stdout=written, stderr=subprocess.PIPE, text=True, check=False)
    os.close(written)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_only_on_a_terminal_that_wants_it(variables, coloured):
    env = {**environment(release("0.18.9")), "TERM": "xterm", **variables}
    assert ("\033[33m[!]\033[0m" in on_a_terminal("doctor", env=env)) is coloured


def on_a_terminal(*argv: str, env: dict[str, str]) -> str:
    """What a command prints when its stdout is a terminal."""
    import pty

    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-m", "trainfix", *argv], env=env, stdout=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
        child.wait()
    return said.decode()


# What doctor costs.


def cpu_seconds(*argv: str, env: dict[str, str]) -> float:
    """CPU time of one child, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], env=env, stdout=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_doctor_costs_at_most_its_budget_over_a_bare_interpreter(write, tmp_path):
    import importlib.metadata

    for name in ("torch", "transformers"):
        assert importlib.metadata.version(name), f"{name} must be installed for this measurement to mean anything"
    env = environment(release("0.18.9"))
    doctor = ("-m", "trainfix", "doctor", "--config", str(tmp_path / write()))
    bare = min(cpu_seconds("-c", "pass", env=env) for _ in range(5))
    spent = min(cpu_seconds(*doctor, env=env) for _ in range(5))
    print(f"doctor: {spent - bare:.3f} s of CPU over a bare interpreter")
    # Beside other tests the same work takes up to twice the CPU time.
    crowded = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert spent - bare <= (2 * BUDGET if crowded else BUDGET)


def test_doctor_imports_nothing_that_it_examines(write, tmp_path):
    code = (
        "import sys\nfrom trainfix.cli import main\n"
        "assert main(sys.argv[1:]) == 1\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'rich', 'yaml', 'wrapt', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    argv = [sys.executable, "-c", code, "doctor", "--config", str(tmp_path / write())]
    answer = subprocess.run(argv, env=environment(release("0.18.9")), capture_output=True, text=True, check=False)
    assert answer.stderr == "[]\n"


def test_the_exit_codes_are_the_documented_ones():
    assert (base.OK, base.UNREPAIRED, base.USAGE, base.UNDECIDED) == (0, 1, 2, 3)
