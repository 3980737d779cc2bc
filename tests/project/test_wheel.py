"""A wheel built from the repository, installed into an empty environment outside the checkout, has everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.releases import release

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `cwd` and capture what it says."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source archive, and with the wheel that was built from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and its requirements, and nothing else."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    (wheel,) = built.glob("*.whl")
    done = run(environment / "bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=environment)
    assert done.returncode == 0, done.stderr
    return environment / "bin"


def names_in(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file()}


def test_the_wheel_is_pure_python_and_has_every_source_record_and_patch(built: Path, checkout: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    sources, patches = checkout / "src", checkout / "patches"
    wanted = names_in(sources, "*.py") | names_in(sources, "*.json") | {"trainfix/py.typed"}
    wanted |= {f"trainfix/patches/{name}" for name in names_in(patches, "*")}
    assert wanted - held == set()
    assert {name for name in held if not name.startswith("trainfix")} == set()
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert any(name.endswith("licenses/NOTICE") for name in held)


def test_the_source_archive_has_the_tests_and_the_two_commands(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert {"Makefile", "tools/setup.py", "demo/run.py", "tests/conftest.py", "NOTICE"} <= names
    assert not {name for name in names if name.startswith((".venv", "demo/output"))}


def test_the_environment_holds_only_what_trainfix_requires(installed: Path) -> None:
    listed = run(installed / "python", "-m", "pip", "list", "--format", "json", cwd=installed)
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert names - {"pip", "setuptools"} == {"trainfix", "packaging", "wrapt"}


def test_the_installed_command_says_its_version_and_lists_the_catalogue(installed: Path, checkout: Path) -> None:
    version = run(installed / "trainfix", "--version", cwd=installed)
    assert (version.returncode, version.stdout) == (0, "trainfix 0.1.0\n"), version.stderr
    listed = run(installed / "trainfix", "list", cwd=installed)
    assert listed.returncode == 0, listed.stderr
    records = {path.stem for path in (checkout / "src/trainfix/advisories/records").glob("*.json")}
    assert records
    assert {record for record in records if record in listed.stdout} == records


def test_the_installed_command_prints_the_source_patch_of_a_release(installed: Path, checkout: Path) -> None:
    shown = run(installed / "trainfix", "diff", "TF-0001", "--for", "deepspeed==0.18.9", cwd=installed)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() in {path.read_text().strip() for path in (checkout / "patches/TF-0001").glob("*.patch")}


def test_the_installed_command_judges_a_deepspeed_without_importing_it(installed: Path, checkout: Path) -> None:
    doctor = (installed / "trainfix", "doctor", "--format", "json", "--config", checkout / "demo/ds_zero2_offload.json")
    report = run(*doctor, cwd=installed, PYTHONPATH=str(release("0.18.9")))
    assert report.returncode == 1, report.stderr
    findings = {finding["id"]: finding for finding in json.loads(report.stdout)["findings"]}
    assert (findings["TF-0001"]["verdict"], findings["TF-0001"]["reachable"]) == ("affected", "yes")


def test_the_installed_proofs_start_and_say_what_they_lack(installed: Path) -> None:
    proved = run(installed / "trainfix", "prove", "TF-0001", "--format", "json", cwd=installed)
    assert "Traceback" not in proved.stderr
    (proof,) = json.loads(proved.stdout)["proofs"]
    assert (proof["id"], proof["repaired"]) == ("TF-0001", None)
