"""The source patches apply to every affected release, are recognised there, and make the consumed gradients right.

One entry of `TRIALS` per advisory says how its patches are run. A page's table of numbers has one row per run: cells
that name it, then columns, of which those of a measure and a state ("norm ratio, released", "norm ratio, patched") are
measured again here: one value per window, or coefficients, the same in every window (a dot: not used there).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from tests.support import experiment
from tests.support.releases import RELEASES, release
from trainfix import advisories
from trainfix.advisories import Advisory, SourcePatch, patches_folder
from trainfix.environment.shapes import ABSENT, shape_in_text

pytestmark = pytest.mark.slow

Table = dict[str, dict[str, Any]]
Window = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """How the patches of one advisory are run.

    `right` is what a patched release must get right, beside the rows of its page; `ranks` is for all runs.
    `sum_error` is the largest error allowed against the sum of the gradients as they arrived on the owning rank.
    `contains` are advisories that the patches repair as well, in the releases that have them.
    `healthy` are releases to which no file applies. `numbers` are the page's rows: release -> row -> configuration;
    `part`: what of a window they are about, such as the side branch.
    """

    right: Table
    ranks: int = 1
    sum_error: float = 1.0
    contains: tuple[str, ...] = ()
    healthy: tuple[str, ...] = ()
    numbers: dict[str, Table] = field(default_factory=dict)
    part: str = ""


def each(configuration: dict[str, Any], key: str, *values: Any) -> Table:
    return {str(value): {**configuration, key: value} for value in values}


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
REDUCED_IN_FP32 = {**FP32_SUMS, "communication_data_type": "fp32"}
BY_HAND = {"driver": "accelerate"}
BARE = {"driver": "bare"}
DEVICE = {"offload": False}
STAGE_3 = {"stage": 3}
OVERLAP = {"stage": 1, "overlap": True}
UNUSED = {"scenario": "unused_window", "mask": "1111"}
BF16 = {"dtype": "bf16"}
ZERO_1_SUMS = {"stage": 1, "extra": FP32_SUMS}
UNAVERAGED: Table = {
    "bf16, fp32 sums, offload": {**ZERO_1_SUMS, "dtype": "bf16"},
    "fp16, fp32 sums": {**ZERO_1_SUMS, "dtype": "fp16", "offload": False},
}
DENSE: Table = {"one step": {"ga": 1}, **{f"bf16, {steps}": {**BF16, "ga": steps} for steps in (3, 8)}}

TRIALS: dict[str, Trial] = {
    "TF-0001": Trial(
        right=DENSE,
        healthy=("0.15.1", "0.19.0", "0.19.8"),
        numbers={"0.18.9": each({}, "ga", 2, 3, 8)},
    ),
    "TF-0002": Trial(
        right={"one step": {**DEVICE, "ga": 1}, "bf16": {**DEVICE, **BF16}, "by hand": {**DEVICE, **BY_HAND}},
        healthy=("0.17.5", "0.18.3"),
        numbers={"0.18.2": each(DEVICE, "ga", 2, 3, 8)},
    ),
    "TF-0003": Trial(
        right={"one step": {"ga": 1}, **{f"bf16, {steps}": {**BY_HAND, **BF16, "ga": steps} for steps in (2, 3, 8)}},
        contains=("TF-0001",),
        healthy=("0.19.0", "0.19.8"),
        numbers={"0.18.9": each(BY_HAND, "ga", 2, 3, 8)},
    ),
    "TF-0004": Trial(
        right={
            **DENSE,
            "set by hand": BY_HAND,
            "stage 1": {"stage": 1},
            "0110, clipping, small buckets, overlap": {"mask": "0110", "clip": 0.1, "bucket": 500, "overlap": True},
            "0110, set by hand": {**BY_HAND, "mask": "0110"},
            "1110, fp16 with a skip": {"mask": "1110", "dtype": "fp16", "loss_scale": 0, "overflow_window": 1},
            "unused, one micro-batch": {**UNUSED, "ga": 1, "mask": "1"},
        },
        contains=("TF-0001", "TF-0003", "TF-0013"),
        numbers={
            "0.19.8": {
                **each({}, "mask", "0111", "1110", "1000", "0001", "0110"),
                "1111, 0000, 1111": UNUSED,
                "1111, 0000, 1111, stage 1": {**UNUSED, "stage": 1},
            }
        },
    ),
    "TF-0005": Trial(
        right={
            f"{mask}, {'offload' if offload else 'device'}": {**STAGE_3, "offload": offload, "mask": mask}
            for mask in ("0111", "1110", "0110", "111100001111", "1111")
            for offload in (True, False)
        },
        numbers={
            "0.19.8": {
                "0111, yes, no": {**STAGE_3, "mask": "0111"},
                **{
                    f"{mask}, {name}": {**STAGE_3, "mask": mask, "offload": offload}
                    for mask in ("0110", "1110")
                    for name, offload in (("yes", True), ("no", False))
                },
            }
        },
        part="side",
    ),
    "TF-0006": Trial(
        right=each(UNAVERAGED["bf16, fp32 sums, offload"], "overlap", True, False),
        ranks=2,
        healthy=("0.19.8",),
        numbers={
            "0.18.9": {
                f"{name}, {steps}": {**configuration, "ga": steps}
                for name, configuration in UNAVERAGED.items()
                for steps in (1, 8)
            }
        },
    ),
    "TF-0007": Trial(
        right=each({**ZERO_1_SUMS, **DEVICE, **BF16}, "ga", 1, 4),
        ranks=2,
        healthy=("0.19.0",),
        numbers={"0.18.9": each({**DEVICE, **BF16, "stage": 1, "extra": REDUCED_IN_FP32}, "ga", 1, 2, 3, 8)},
    ),
    "TF-0008": Trial(
        right={
            f"stage {stage}, {backward}": {**DEVICE, "stage": stage, "backward": backward}
            for stage in (0, 1, 2, 3)
            for backward in ("unscaled", "engine")
        },
        healthy=("0.18.2", "0.18.4"),
        numbers={"0.18.3": each({**DEVICE, "stage": 1, "backward": "unscaled"}, "ga", 2, 3, 8)},
    ),
    "TF-0009": Trial(
        right={
            "fp16": {"dtype": "fp16", "ga": 3},
            "fp32": {"ga": 3},
            "one micro-batch": {**BF16, "ga": 1},
            "set by hand": {**BF16, **BY_HAND},
            "clipping, small buckets, overlap": {**BF16, "clip": 0.1, "bucket": 500, "overlap": True},
        },
        sum_error=1e-6,
        contains=("TF-0001", "TF-0003"),
        numbers={
            version: {f"{version}, {steps}": {**BF16, "ga": steps} for steps in (2, 8)}
            for version in ("0.15.1", "0.18.9", "0.19.8")
        },
    ),
    "TF-0013": Trial(
        right={
            "stage 1": {**BARE, "stage": 1},
            "bf16": {**BARE, **BF16},
            "0110": {**BARE, "mask": "0110"},
            "1010": {**BARE, "mask": "1010"},
            "fp16 with a skip": {**BARE, "dtype": "fp16", "loss_scale": 0, "overflow_window": 1},
            "one step": {**BARE, "ga": 1},
        },
        contains=("TF-0004",),
        healthy=("0.18.9",),
        numbers={"0.19.8": each(BARE, "ga", 2, 3, 8)},
    ),
    "TF-0042": Trial(
        right={
            f"{mask}, {'offload' if offload else 'device'}": {**OVERLAP, "offload": offload, "mask": mask}
            for mask in ("1110", "0110", "1111")
            for offload in (True, False)
        },
        ranks=2,
    ),
}

# Name of a column -> what a window has, how close it must be to what the page says.
MEASURES: dict[str, tuple[Callable[[Window], list[float]], dict[str, Any]]] = {
    "coefficients": (lambda window: window["coefficients"], {"abs": 1e-3}),
    "norm ratio": (lambda window: [window["norm_ratio"]], {"abs": 1e-3}),
    "relative error": (lambda window: [window["relative_error"]], {"rel": 0.05, "abs": 1e-3}),
    "error of the sum": (lambda window: [window["captured"]["relative_error"]], {"rel": 0.2, "abs": 1e-6}),
}


def releases_of(patch: SourcePatch) -> list[str]:
    return list(SpecifierSet(patch.releases).filter(RELEASES))


def patch_file(advisory: Advisory, patch: SourcePatch) -> Path:
    return patches_folder() / advisory.id / patch.file


def changed_files(patch: Path) -> list[Path]:
    return [Path(name) for name in re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)]


def source_of(target: str) -> Path:
    return Path(*target.split(":")[0].split(".")).with_suffix(".py")


ADVISORIES = [advisory for advisory in advisories.load_all() if advisory.id in TRIALS]
PAIRS = [(advisory, patch) for advisory in ADVISORIES for patch in advisory.source_patches]
every_advisory = pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: advisory.id)
every_file = pytest.mark.parametrize(
    ("advisory", "patch"), PAIRS, ids=[f"{advisory.id}-{patch.file}" for advisory, patch in PAIRS]
)
every_release = pytest.mark.parametrize(
    ("advisory", "patch", "version"),
    [
        pytest.param(advisory, patch, version, id=f"{advisory.id}-{version}")
        for advisory, patch in PAIRS
        for version in releases_of(patch)
    ],
)


def apply(file: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["patch", "-p1", "--fuzz=0", "--batch", "--no-backup-if-mismatch", "-i", str(file), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def only_sources(version: str, folder: Path, files: list[Path]) -> dict[Path, str]:
    """Fill a folder with these files of a release, as far as it has them. Their texts."""
    texts: dict[Path, str] = {}
    for file in files:
        if (release(version) / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(release(version) / file, folder / file)
            texts[file] = (folder / file).read_text(encoding="utf-8")
    return texts


@cache
def released_shape(version: str, target: str) -> str:
    file = release(version) / source_of(target)
    return (shape_in_text(file.read_text(encoding="utf-8"), target.split(":")[1]) if file.is_file() else None) or ABSENT


def verdict(advisory: Advisory, version: str, folder: Path, files: list[Path]) -> str:
    """The verdict on a release of which these files lie, as they are now, in the folder."""
    shapes: dict[str, str | None] = {
        target: shape_in_text((folder / source_of(target)).read_text(encoding="utf-8"), target.split(":")[1]) or ABSENT
        if source_of(target) in files
        else released_shape(version, target)
        for target in advisory.evidence
    }
    return advisories.judge(advisory, {advisory.package: version}, shapes).verdict


def test_every_advisory_with_patches_has_a_trial() -> None:
    assert [advisory.id for advisory in advisories.load_all() if advisory.source_patches] == list(TRIALS)


@every_advisory
def test_every_affected_release_has_one_patch_and_no_other_release_has_any(advisory: Advisory) -> None:
    offered = [version for patch in advisory.source_patches for version in releases_of(patch)]
    assert offered == list(advisory.affected)
    files = {file.name for file in (patches_folder() / advisory.id).glob("*.patch")}
    assert files == {patch.file for patch in advisory.source_patches}


@every_release
def test_it_applies_without_fuzz_is_recognised_and_can_be_taken_back(
    advisory: Advisory, patch: SourcePatch, version: str, tmp_path: Path
) -> None:
    file = patch_file(advisory, patch)
    changed = changed_files(file)
    before = only_sources(version, tmp_path, changed)
    assert verdict(advisory, version, tmp_path, []) == "affected"
    done = apply(file, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "fuzz" not in done.stdout
    for name in changed:
        compile((tmp_path / name).read_text(encoding="utf-8"), name.name, "exec")
    assert verdict(advisory, version, tmp_path, changed) == "fixed-by-source-patch"
    assert apply(file, tmp_path, "-R").returncode == 0
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in changed} == before


@every_file
def test_other_advisories_are_judged_as_before_unless_the_patch_contains_theirs(
    advisory: Advisory, patch: SourcePatch, tmp_path: Path
) -> None:
    file = patch_file(advisory, patch)
    changed = changed_files(file)
    repaired = {advisory.id, *TRIALS[advisory.id].contains}
    for version in dict.fromkeys([releases_of(patch)[0], releases_of(patch)[-1]]):
        folder = tmp_path / version
        only_sources(version, folder, changed)
        assert apply(file, folder).returncode == 0
        for other in advisories.load_all():
            if not {source_of(target) for target in other.evidence} & set(changed):
                continue
            expected = verdict(other, version, folder, [])
            if expected == "affected" and other.id in repaired:
                expected = "fixed-by-source-patch"
            assert verdict(other, version, folder, changed) == expected, other.id


@pytest.mark.parametrize(
    ("advisory", "version"), [(advisory, v) for advisory in ADVISORIES for v in TRIALS[advisory.id].healthy]
)
def test_no_file_applies_to_a_healthy_release(advisory: Advisory, version: str, tmp_path: Path) -> None:
    for patch in advisory.source_patches:
        file = patch_file(advisory, patch)
        only_sources(version, tmp_path, changed_files(file))
        assert apply(file, tmp_path, "--dry-run", "-N").returncode != 0


def test_the_files_of_tf_0013_are_those_of_tf_0004() -> None:
    for file in (patches_folder() / "TF-0013").glob("*.patch"):
        assert file.read_bytes() == (patches_folder() / "TF-0004" / file.name).read_bytes()


def run(folder: Path, table: Table, ranks: int) -> dict[str, list[Window]]:
    """The windows of every configuration that were not skipped."""
    program = "tests.fixes.deepspeed.scenarios"
    results = experiment.run(folder, list(table.values()), trainfix=False, ranks=ranks, program=program)
    assert [result["error"] for result in results] == [None] * len(table)
    return {
        name: [window for window in result["windows"] if not window["skipped"]]
        for name, result in zip(table, results, strict=True)
    }


def samples() -> Iterator[Any]:
    """The releases to run: the last of every file, and the first of the advisory's range."""
    for advisory, patch in PAIRS:
        versions = releases_of(patch)
        ends = [versions[0], versions[-1]] if patch is advisory.source_patches[0] else [versions[-1]]
        for version in dict.fromkeys(ends):
            yield pytest.param(advisory, patch, version, id=f"{advisory.id}-{version}")


@pytest.mark.parametrize(("advisory", "patch", "version"), list(samples()))
def test_a_patched_release_consumes_what_it_should(
    advisory: Advisory, patch: SourcePatch, version: str, tmp_path: Path
) -> None:
    trial = TRIALS[advisory.id]
    folder = tmp_path / "patched"
    shutil.copytree(release(version), folder)
    assert apply(patch_file(advisory, patch), folder).returncode == 0
    page = {f"page, {name}": row for table in trial.numbers.values() for name, row in table.items()}
    found = run(folder, {**trial.right, **page}, trial.ranks)
    for name, windows in found.items():
        # 16 bits: every micro-batch is rounded by the division by GA, and so is the sum, as far as it is kept in them.
        narrow = {**trial.right, **page}[name].get("dtype", "fp32") != "fp32"
        for window in windows:
            assert_right(window, 2e-2 if narrow else 1e-3)
            assert window["captured"]["relative_error"] < trial.sum_error, name
    compare(advisory, version, "patched", {name.removeprefix("page, "): windows for name, windows in found.items()})


def assert_right(window: Window, tolerance: float) -> None:
    assert window["coefficients"] == pytest.approx([1.0] * len(window["coefficients"]), abs=tolerance)
    assert window["earlier"] == pytest.approx([0.0] * len(window["earlier"]), abs=tolerance)
    assert window["relative_error"] < tolerance
    for ratio in ("norm_ratio", "global_norm_ratio"):
        assert window[ratio] is None or window[ratio] == pytest.approx(1.0, abs=tolerance)


def rows(page: Path) -> dict[str, dict[str, str]]:
    """The page's table of numbers: what names a row -> column -> cell."""
    found: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if any(is_number(cell) for cell in cells):
            header = cells
        elif len(cells) != len(header):
            header = []
        elif header and not set(line) <= set("|-"):
            names = next(i for i, column in enumerate(header) if is_number(column))
            row = dict(zip(header, cells, strict=True))
            found[", ".join(cells[:names])] = {column: cell for column, cell in row.items() if is_number(column)}
    return found


def is_number(column: str) -> bool:
    measure, _, state = column.partition(", ")
    return measure in MEASURES and state in ("released", "patched")


def compare(advisory: Advisory, version: str, state: str, found: dict[str, list[Window]]) -> None:
    """What was found on one release, with what the page says of it."""
    trial, said = TRIALS[advisory.id], rows(patches_folder() / advisory.id / "README.md")
    for name in trial.numbers.get(version, {}):
        columns = {column: cell for column, cell in said[name].items() if column.endswith(state)}
        assert columns
        for column, cell in columns.items():
            measure, closeness = MEASURES[column.partition(", ")[0]]
            numbers = [numbers.split(",") for numbers in cell.split()]
            numbers *= len(found[name]) if len(numbers) == 1 else 1
            for window, expected in zip(found[name], numbers, strict=True):
                measured = measure(window[trial.part] if trial.part else window)
                pairs = [(a, float(b)) for a, b in zip(measured, expected, strict=True) if b != "."]
                assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], **closeness), (name, column)


@every_advisory
def test_the_table_on_the_page_is_what_the_release_does(advisory: Advisory) -> None:
    trial = TRIALS[advisory.id]
    assert list(rows(patches_folder() / advisory.id / "README.md")) == [
        name for table in trial.numbers.values() for name in table
    ]
    for version, table in trial.numbers.items():
        compare(advisory, version, "released", run(release(version), table, trial.ranks))


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
    advisory = advisories.load("TF-0001")
    files = [source_of(target) for target in advisory.evidence]
    assert verdict(advisory, "0.18.9", site, files) == "fixed-by-source-patch"


def _with_site(site: Path) -> dict[str, str]:
    """The environment of a user whose DeepSpeed is installed in `site`."""
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": str(site), "PATH": binaries}
