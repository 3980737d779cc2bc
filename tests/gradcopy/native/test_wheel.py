"""The wheel of trainfix-native is one small file for every Python, and needs nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.gradcopy.native import building

pytestmark = pytest.mark.slow

LOADS = "from trainfix.gradcopy import native; assert native.adder() is not None"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = building.lacks()
    if missing:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", building.copy(folder), "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_is_for_every_python_from_3_10_on(wheel: Path) -> None:
    assert re.fullmatch(r"trainfix_native-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)


def test_the_wheel_holds_the_loop_and_its_licence_and_nothing_else(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(licence) == (checkout / "LICENSE").read_bytes()
    assert names == {"trainfix_native/__init__.py", "trainfix_native/_loop.abi3.so"}


def test_the_wheel_requires_no_other_distribution(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert (metadata["Name"], metadata["License-Expression"]) == ("trainfix-native", "Apache-2.0")
    assert metadata.get_all("Requires-Dist") is None
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_installed_wheel_is_found_and_is_a_module_python_can_import(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for code in (LOADS, "import trainfix_native._loop"):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
