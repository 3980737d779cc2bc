"""Where a function that a repair stands on has an unknown body, nothing is replaced, and a run that reaches the error
stops; one that does not trains as if trainfix were not there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixes.deepspeed.judging import assert_same_bits, states
from tests.support import experiment
from tests.support.releases import release

STAGE_2 = Path("deepspeed/runtime/zero/stage_1_and_2.py")
PROGRAM = "tests.fixes.deepspeed.scenarios"
OVERLAP = {"stage": 1, "offload": False, "overlap": True}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}

# TF-0001 and TF-0003: tests/engine/test_deepspeed.py. TF-0005, TF-0007 and TF-0008: the tests of their own.
Case = tuple[str, str, int, dict[str, tuple[str, dict[str, Any]]], dict[str, Any]]
CASES: dict[str, Case] = {
    # release, altered function, ranks, what reaches which error, what reaches none
    "offload_accumulation": (
        "0.19.8",
        "scaled_global_norm",
        1,
        {
            "unused in the last micro-batch": ("TF-0004", {"mask": "1110"}),
            "unused in the first one": ("TF-0004", {"mask": "0111"}),
            "a second backward": ("TF-0013", {"driver": "bare"}),
        },
        {"ga": 4},
    ),
    "partition_accumulation": (
        "0.18.2",
        "get_flat_partition",
        1,
        {
            "four steps": ("TF-0002", {"offload": False}),
            "boundary set by hand": ("TF-0002", {"offload": False, "driver": "accelerate"}),
        },
        {"offload": False, "ga": 1},
    ),
    "accumulator_reduction": (
        "0.19.7",
        "zero_grad",
        2,
        {"float32 sums": ("TF-0006", {"stage": 1, "dtype": "bf16", "extra": FP32_SUMS})},
        {"stage": 1, "dtype": "bf16"},
    ),
    "stage1_overlap": (
        "0.19.8",
        "reduce_ready_partitions_and_remove_grads",
        1,
        {
            "unused in the last micro-batch": (
                "TF-0042",
                {"stage": 1, "offload": False, "overlap": True, "mask": "1110"},
            )
        },
        {"stage": 1, "offload": False, "overlap": True, "mask": "0111"},
    ),
}


def altered(version: str, function: str, folder: Path) -> Path:
    """A copy of the release in which one function has a statement more, which does nothing."""
    shutil.copytree(release(version), folder)
    file = folder / STAGE_2
    signature = re.compile(rf"^    def {function}\(.*?\):\n", re.MULTILINE | re.DOTALL)
    text, count = signature.subn(lambda found: found[0] + "        assert True\n", file.read_text(encoding="utf-8"), 1)
    assert count == 1
    file.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_unknown_body_is_refused_loud_where_it_is_reached_and_silent_where_it_is_not(
    name: str, tmp_path: Path
) -> None:
    version, function, ranks, reaching, harmless = CASES[name]
    folder = altered(version, function, tmp_path / "altered")
    wanted = [harmless, *(configuration for _, configuration in reaching.values())]
    trains, *stopped = experiment.run(folder, wanted, trainfix=True, ranks=ranks, program=PROGRAM)
    (released,) = experiment.run(folder, [harmless], trainfix=False, ranks=ranks, program=PROGRAM)
    assert_same_bits(trains, released)
    for (id, _), result in zip(reaching.values(), stopped, strict=True):
        assert states(result)[id] == "refused"
        assert f"UnfixedBugError: {id} is reached and not repaired" in result["error"]
        assert f"{function} has an unknown body" in result["error"]
