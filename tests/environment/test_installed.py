"""What is installed, from metadata and source text alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.releases import release
from trainfix.environment.installed import Distribution, EnvironmentProblem, find, source_text

MODULE = "deepspeed.runtime.zero.stage_1_and_2"


def install(folder: Path, version: str | None, name: str = "deepspeed") -> Path:
    """A copy of a package: its metadata and one module."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\n" + (f"Version: {version}\n" if version else ""))
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise AssertionError('imported')\n")
    return folder


def test_a_real_release_is_found_without_importing_it() -> None:
    folder = release("0.18.9")
    (found,) = find("deepspeed", [str(folder)])
    assert found == Distribution("deepspeed", "0.18.9", folder.resolve())
    text = source_text(found, MODULE)
    assert text is not None and "class DeepSpeedZeroOptimizer(" in text
    assert source_text(found, "deepspeed") == (folder / "deepspeed" / "__init__.py").read_text(encoding="utf-8")
    assert "deepspeed" not in sys.modules


def test_every_copy_is_found_and_the_one_an_import_takes_comes_first(tmp_path: Path) -> None:
    first, second = install(tmp_path / "a", "1.0"), install(tmp_path / "b", "2.0")
    paths = [str(tmp_path / "nothing"), str(first), str(second), str(first)]
    assert [(copy.version, copy.location) for copy in find("deepspeed", paths)] == [("1.0", first), ("2.0", second)]
    assert [copy.version for copy in find("deepspeed", [str(second), str(first)])] == ["2.0", "1.0"]


def test_the_default_is_the_interpreters_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "a", "1.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), *sys.path])
    assert find("deepspeed")[0].version == "1.0"
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setattr(sys, "path", [""])
    assert find("deepspeed") == [Distribution("deepspeed", "1.0", tmp_path / "a")]


def test_what_is_not_installed_is_an_empty_list(tmp_path: Path) -> None:
    install(tmp_path / "a", "1.0", name="deepspeed_mii")
    assert find("deepspeed", [str(tmp_path / "a"), str(tmp_path / "missing.zip")]) == []


def test_metadata_without_a_version_is_a_problem_that_names_the_place_and_the_next_step(tmp_path: Path) -> None:
    folder = install(tmp_path / "a", None)
    with pytest.raises(EnvironmentProblem) as caught:
        find("deepspeed", [str(folder)])
    assert str(caught.value) == (
        f"deepspeed in {folder} has no version in its metadata: the installation is broken; "
        "reinstall it with `pip install --force-reinstall --no-deps deepspeed`"
    )


def test_a_module_without_source_has_no_text(tmp_path: Path) -> None:
    (copy,) = find("deepspeed", [str(install(tmp_path / "a", "1.0"))])
    (copy.location / "deepspeed" / "compiled.pyc").write_bytes(b"\0")
    for module in ("deepspeed.compiled", "deepspeed.missing", "deepspeed.__init__.deeper", MODULE):
        assert source_text(copy, module) is None


@pytest.mark.parametrize("unreadable", ["directory", "latin-1"])
def test_source_that_cannot_be_read_is_a_problem_that_names_the_file(unreadable: str, tmp_path: Path) -> None:
    (copy,) = find("deepspeed", [str(install(tmp_path / "a", "1.0"))])
    file = copy.location / "deepspeed" / "broken.py"
    if unreadable == "directory":
        file.mkdir()
    else:
        file.write_bytes(b"# \xe9\n")
    with pytest.raises(EnvironmentProblem, match=r"make it readable, or reinstall deepspeed 1\.0$") as caught:
        source_text(copy, "deepspeed.broken")
    assert str(caught.value).startswith(f"cannot read {file}: ")
