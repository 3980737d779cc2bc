"""The source patches apply to every affected release, are recognised there, and keep every micro-batch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.experiment import run
from tests.support.releases import RELEASES, release
from trainfix import advisories
from trainfix.advisories import Advisory, SourcePatch, patches_folder
from trainfix.environment.shapes import shape_in_text

pytestmark = pytest.mark.slow

SOURCE = Path("deepspeed/runtime/zero/stage_1_and_2.py")
ADVISORIES = [advisory for advisory in advisories.load_all() if advisory.source_patches]
# 0.14.0 to 0.14.3 do not import beside the torch and numpy of the tests; their functions are those of 0.14.4.
RUNNABLE = RELEASES[RELEASES.index("0.14.4") :]
DRIVERS = {"TF-0001": "every", "TF-0003": "accelerate"}


def releases_of(patch: SourcePatch) -> list[str]:
    return list(SpecifierSet(patch.releases).filter(RELEASES))


def patch_file(advisory: Advisory, patch: SourcePatch) -> Path:
    return patches_folder() / advisory.id / patch.file


PAIRS = [(advisory, patch) for advisory in ADVISORIES for patch in advisory.source_patches]
CASES = [
    pytest.param(advisory, patch, version, id=f"{advisory.id}-{version}")
    for advisory, patch in PAIRS
    for version in releases_of(patch)
]
every_case = pytest.mark.parametrize(("advisory", "patch", "version"), CASES)


def apply(file: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["patch", "-p1", "--fuzz=0", "--batch", "--no-backup-if-mismatch", "-i", str(file), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def only_source(version: str, folder: Path) -> Path:
    """A folder with nothing of the release but the file that the patches change."""
    (folder / SOURCE).parent.mkdir(parents=True)
    shutil.copy(release(version) / SOURCE, folder / SOURCE)
    return folder


def verdict(advisory: Advisory, version: str, folder: Path) -> str:
    text = (folder / SOURCE).read_text(encoding="utf-8")
    shapes = {target: shape_in_text(text, target.split(":")[1]) for target in advisory.evidence}
    return advisories.judge(advisory, version, shapes).verdict


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: advisory.id)
def test_every_affected_release_has_one_patch_and_no_other_release_has_any(advisory: Advisory) -> None:
    offered = [version for patch in advisory.source_patches for version in releases_of(patch)]
    assert offered == list(advisory.affected)
    files = {file.name for file in (patches_folder() / advisory.id).glob("*.patch")}
    assert files == {patch.file for patch in advisory.source_patches}


@every_case
def test_it_applies_without_fuzz_is_recognised_and_can_be_taken_back(
    advisory: Advisory, patch: SourcePatch, version: str, tmp_path: Path
) -> None:
    folder = only_source(version, tmp_path)
    assert verdict(advisory, version, folder) == "affected"
    before = (folder / SOURCE).read_bytes()
    done = apply(patch_file(advisory, patch), folder)
    assert done.returncode == 0, done.stdout
    assert "fuzz" not in done.stdout
    compile((folder / SOURCE).read_text(encoding="utf-8"), SOURCE.name, "exec")
    assert verdict(advisory, version, folder) == "fixed-by-source-patch"
    assert apply(patch_file(advisory, patch), folder, "-R").returncode == 0
    assert (folder / SOURCE).read_bytes() == before


@pytest.mark.parametrize("version", ["0.15.1", "0.19.0", "0.19.8"])
@pytest.mark.parametrize("patch", advisories.load("TF-0001").source_patches, ids=lambda patch: patch.file)
def test_the_patch_of_tf_0001_does_not_apply_to_a_healthy_release(
    patch: SourcePatch, version: str, tmp_path: Path
) -> None:
    folder = only_source(version, tmp_path)
    assert apply(patch_file(advisories.load("TF-0001"), patch), folder, "--dry-run", "-N").returncode != 0


@pytest.mark.parametrize("version", ["0.15.2", "0.18.9"])
def test_the_patch_of_tf_0003_repairs_tf_0001_as_well(version: str, tmp_path: Path) -> None:
    first, third = (advisories.load(name) for name in ("TF-0001", "TF-0003"))
    (patch,) = (patch for patch in third.source_patches if version in releases_of(patch))
    folder = only_source(version, tmp_path)
    assert apply(patch_file(third, patch), folder).returncode == 0
    assert verdict(first, version, folder) == verdict(third, version, folder) == "fixed-by-source-patch"


def patched_release(advisory: Advisory, patch: SourcePatch, version: str, folder: Path) -> Path:
    shutil.copytree(release(version), folder)
    done = apply(patch_file(advisory, patch), folder)
    assert done.returncode == 0, done.stdout
    return folder


def sample(advisory: Advisory, patch: SourcePatch) -> str:
    """The release to run a patch on: one per file, and among them both ends of the advisory's range."""
    versions = [version for version in releases_of(patch) if version in RUNNABLE]
    return versions[0] if patch is advisory.source_patches[0] else versions[-1]


@pytest.mark.parametrize(
    ("advisory", "patch", "version"),
    [
        pytest.param(advisory, patch, version, id=f"{advisory.id}-{version}")
        for advisory, patch in PAIRS
        for version in [sample(advisory, patch)]
    ],
)
def test_a_patched_release_keeps_every_micro_batch(
    advisory: Advisory, patch: SourcePatch, version: str, tmp_path: Path
) -> None:
    folder = patched_release(advisory, patch, version, tmp_path / "patched")
    driver = DRIVERS[advisory.id]
    wanted = [{"ga": ga, "dtype": dtype, "driver": driver} for ga in (2, 3, 8) for dtype in ("fp32", "bf16")]
    wanted.append({"ga": 1, "driver": "every"})
    for result in run(folder, wanted, trainfix=False):
        assert result["error"] is None
        # bf16: every micro-batch is rounded by the division by GA, and the sum is kept in bf16, as in 0.19.0.
        tolerance = 2e-2 if result["configuration"].get("dtype") == "bf16" else 1e-3
        for window in result["windows"]:
            steps = result["configuration"]["ga"]
            assert window["coefficients"] == pytest.approx([1.0] * steps, abs=tolerance), result["configuration"]
            assert window["relative_error"] < tolerance
            assert window["norm_ratio"] == pytest.approx(1.0, abs=tolerance)


def table(page: Path) -> list[dict[str, Any]]:
    """The rows of the page's table of numbers: steps, then coefficients and norm ratios, released and patched."""
    pattern = re.compile(r"^\| (\d+) \| ([\d,]+) \| ([\d. ]+) \| ([\d,]+) \| ([\d. ]+) \|$", re.MULTILINE)
    return [
        {
            "ga": int(steps),
            "released": ([float(x) for x in coefficients.split(",")], [float(x) for x in ratios.split()]),
            "patched": ([float(x) for x in mended.split(",")], [float(x) for x in mended_ratios.split()]),
        }
        for steps, coefficients, ratios, mended, mended_ratios in pattern.findall(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: advisory.id)
def test_the_table_on_the_page_is_what_0_18_9_does(advisory: Advisory) -> None:
    rows = table(patches_folder() / advisory.id / "README.md")
    assert [row["ga"] for row in rows] == [2, 3, 8]
    wanted = [{"ga": row["ga"], "driver": DRIVERS[advisory.id]} for row in rows]
    for row, result in zip(rows, run(release("0.18.9"), wanted, trainfix=False), strict=True):
        coefficients, ratios = row["released"]
        assert result["error"] is None
        assert [window["norm_ratio"] for window in result["windows"]] == pytest.approx(ratios, abs=1e-3)
        for window in result["windows"]:
            assert window["coefficients"] == pytest.approx(coefficients, abs=1e-3)
        # The patched columns: the test above measures them on patched releases, 0.18.9 among them.
        assert row["patched"] == ([1.0] * row["ga"], [1.0] * 3)


def test_the_commands_on_the_page_patch_an_installation(checkout: Path, tmp_path: Path) -> None:
    page = (patches_folder() / "TF-0001" / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    site = tmp_path / "site"
    shutil.copytree(release("0.18.9"), site)
    script = "set -eu\n" + commands
    done = subprocess.run(
        ["sh", "-c", script], cwd=checkout, env=_with_site(site), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdict(advisories.load("TF-0001"), "0.18.9", site) == "fixed-by-source-patch"


def _with_site(site: Path) -> dict[str, str]:
    """The environment of a user whose DeepSpeed is installed in `site`."""
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": str(site), "PATH": binaries}
