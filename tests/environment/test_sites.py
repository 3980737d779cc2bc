"""Other environments, told from files alone: where their packages lie, and for which Python."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from trainfix.environment.installed import find
from trainfix.environment.sites import Site, SiteError, site

LIB = "lib/python3.11/site-packages"


def environment(prefix: Path, config: str | None = "version = 3.11.7\n", lib: str = LIB) -> Path:
    """A virtual environment as far as files go; returns its site-packages folder."""
    folder = prefix / lib
    folder.mkdir(parents=True)
    if config is not None:
        (prefix / "pyvenv.cfg").write_text(config)
    (prefix / "bin").mkdir(exist_ok=True)
    return folder


def words(where: object) -> str:
    with pytest.raises(SiteError) as caught:
        site(str(where))
    assert str(caught.value).isprintable()
    return str(caught.value)


# Environments that are there


@pytest.mark.parametrize("shared", [False, True])
def test_a_virtual_environment_has_the_packages_that_its_own_interpreter_sees(tmp_path, shared):
    venv.create(tmp_path / "env", system_site_packages=shared, symlinks=True)
    python = str(tmp_path / "env/bin/python")
    code = "import sys, platform; print(platform.python_version()); print(*sys.path, sep='\\n')"
    version, *paths = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True).stdout.splitlines()
    seen = [path for path in paths if "-packages" in path and os.path.isdir(path)]
    for where in (tmp_path / "env", python):
        found = site(str(where))
        assert found.python == version
        assert [path for path in found.paths if path in seen] == seen
        assert (len(found.paths) > 1) == shared


def test_this_interpreter_is_found_by_its_path():
    found = site(sys.executable)
    assert sysconfig.get_path("purelib") in found.paths
    assert (found.python or "").startswith(".".join(map(str, sys.version_info[:2])))
    assert find("pytest", found.paths)


def test_a_link_in_a_virtual_environment_leads_to_that_environment_not_to_the_base(tmp_path):
    base = environment(tmp_path / "base", config=None)
    python = tmp_path / "base/bin/python3.11"
    python.write_text("#!/bin/sh\nexit 1\n")
    folder = environment(tmp_path / "env")
    (tmp_path / "env/bin/python3").symlink_to(python)
    (tmp_path / "env/bin/python").symlink_to("python3")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("../env/bin/python")
    assert site(f"{tmp_path}/env/bin/python") == Site((str(folder),), "3.11.7")
    assert site(f"{tmp_path}/bin/python") == Site((str(folder),), "3.11.7")
    assert site(str(python)) == Site((str(base),), "3.11")


@pytest.mark.parametrize(
    ("config", "python"),
    [
        ("home = /nowhere\nversion_info = 3.11.7.final.0\n", "3.11.7"),
        ("version_info = 3.11.7\r\nuv = 0.13.9\r\n", "3.11.7"),
        ("VERSION=3.11.7", "3.11.7"),
        ("", "3.11"),
        ("version = 3.10.1", "3.11"),
        ("version = \x1b[31m", "3.11"),
    ],
)
def test_the_version_of_python_is_told_by_pyvenv_cfg_or_the_folder(tmp_path, config, python):
    folder = environment(tmp_path, config)
    assert site(str(tmp_path)) == Site((str(folder),), python)
    assert site(str(folder)) == Site((str(folder),), python)


def test_a_conda_environment_tells_the_version_by_its_record(tmp_path):
    folder = environment(tmp_path, None)
    (tmp_path / "conda-meta").mkdir()
    (tmp_path / "conda-meta/python-dateutil-2.9.0-py_0.json").write_text("{}")
    (tmp_path / "conda-meta/python-3.11.9-h955ad1f_0_cpython.json").write_text("{}")
    assert site(str(tmp_path)) == Site((str(folder),), "3.11.9")


def test_a_site_packages_folder_may_be_named_itself(tmp_path):
    metadata = tmp_path / "target/deepspeed-0.18.9.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.9\n")
    found = site(str(tmp_path / "target"))
    assert found == Site((str(tmp_path / "target"),), None)
    assert [copy.version for copy in find("deepspeed", found.paths)] == ["0.18.9"]
    (tmp_path / "site-packages").mkdir()
    assert site(str(tmp_path / "site-packages")).paths == (str(tmp_path / "site-packages"),)


def test_debians_folders_are_found(tmp_path):
    local = environment(tmp_path, None, "local/lib/python3.11/dist-packages")
    own = environment(tmp_path, None, "lib/python3/dist-packages")
    assert site(str(tmp_path)) == Site((str(local), str(own)), "3.11")


def test_a_folder_that_is_linked_under_two_names_counts_once(tmp_path):
    folder = environment(tmp_path)
    (tmp_path / "lib64").symlink_to("lib")
    assert site(str(tmp_path)).paths == (str(folder),)


def test_shared_packages_come_after_the_environments_own(tmp_path):
    base = environment(tmp_path / "base", None)
    config = f"home = {tmp_path}/base/bin\nInclude-System-Site-Packages = True\nversion = 3.11.7\n"
    own = environment(tmp_path / "env", config)
    assert site(str(tmp_path / "env")).paths == (str(own), str(base))
    assert site(str(own)).paths == (str(own),)


# .pth files


def test_pth_files_add_existing_folders_and_nothing_of_them_is_executed(tmp_path):
    folder = environment(tmp_path / "env")
    for name in ("editable", "z", "twice", "nested"):
        (tmp_path / name).mkdir()
    (folder / "inside").mkdir()
    proof = tmp_path / "executed"
    (folder / "b.pth").write_text(
        f"# {tmp_path}/z\n\nimport os; os.mkdir({str(proof)!r})\nimport\tos\n"
        f"{tmp_path}/missing\n\x00\n{tmp_path}/twice\n"
    )
    (folder / "a.pth").write_bytes(f"\ufeff{tmp_path}/editable\r\ninside  \r\n{tmp_path}/twice\r\n".encode())
    (folder / "c.pth").write_bytes(b"\xff\xfe\x00")
    (folder / ".hidden.pth").write_text(f"{tmp_path}/z\n")
    (folder / "d.pth").mkdir()
    os.mkfifo(folder / "e.pth")
    (folder / "f.pth").symlink_to("f.pth")
    (tmp_path / "editable/g.pth").write_text(f"{tmp_path}/nested\n")
    expected = (folder, tmp_path / "editable", folder / "inside", tmp_path / "twice")
    assert site(str(tmp_path / "env")).paths == tuple(map(str, expected))
    assert not proof.exists()


def test_an_editable_install_is_found_by_its_path(tmp_path):
    folder = environment(tmp_path / "env")
    source = tmp_path / "DeepSpeed"
    (source / "deepspeed.egg-info").mkdir(parents=True)
    (source / "deepspeed.egg-info/PKG-INFO").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.9+git\n")
    (folder / "easy-install.pth").write_text(f"{source}\n")
    (copy,) = find("deepspeed", site(str(tmp_path / "env")).paths)
    assert (copy.version, copy.location) == ("0.18.9+git", source)


# What is no environment


def test_what_is_no_environment_is_named_with_what_is_near(tmp_path):
    environment(tmp_path / "project/.venv")
    start = f"{tmp_path}/project is not a Python environment: there is no pyvenv.cfg, conda-meta, "
    assert words(tmp_path / "project").startswith(start)
    for where in ("project", "project/.venv/bin", "project/.venv/lib", "project/.ven"):
        assert f"; did you mean {tmp_path}/project/.venv?; name a virtual environment" in words(tmp_path / where)
    assert words(tmp_path / "project/.ven").startswith(f"{tmp_path}/project/.ven: no such folder or interpreter; did ")
    assert "no such folder" in words(tmp_path / "a\x1b[31m") and r"a\x1b[31m" in words(tmp_path / "a\x1b[31m")
    assert words("a\0b").startswith(r"a\x00b: no such folder") or words("a\0b").startswith(r"cannot look into a\x00b")


def test_several_pythons_in_one_prefix_must_be_told_apart(tmp_path):
    old, new = (environment(tmp_path, None, f"lib/python3.{minor}/site-packages") for minor in (10, 11))
    for minor in (10, 11):
        (tmp_path / f"bin/python3.{minor}").touch()
    assert words(tmp_path) == (
        f"{tmp_path} has packages for several versions of Python: name one folder of {old}, {new}"
    )
    assert site(f"{tmp_path}/bin/python3.10") == Site((str(old),), "3.10")


def test_an_environment_without_packages_is_named(tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("version = 3.11.7\n")
    assert f"there is no {tmp_path}/lib/python3.11/site-packages; create it anew" in words(tmp_path)


def test_shared_packages_that_are_not_here_are_said_not_left_out(tmp_path):
    environment(tmp_path, "home = /nowhere/bin\ninclude-system-site-packages = true\nversion = 3.11.7\n")
    assert words(tmp_path) == (
        f"{tmp_path}/pyvenv.cfg says include-system-site-packages = true, but there are no packages of "
        "Python 3.11 at /nowhere: name the site-packages folder itself to leave them out"
    )


def test_a_file_that_is_no_interpreter_is_named(tmp_path):
    (tmp_path / "train.py").touch()
    assert "is a file, but not named like an interpreter" in words(tmp_path / "train.py")
    (tmp_path / "shims").mkdir()
    (tmp_path / "shims/python").touch()
    assert "`pyenv which python` tells the real one" in words(tmp_path / "shims/python")
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in words(tmp_path / "loop")
