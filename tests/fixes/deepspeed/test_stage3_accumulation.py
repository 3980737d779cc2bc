"""TF-0005: parameters that are not used in every micro-batch, under ZeRO-3, without trainfix and with it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, assert_window_right, states, windows
from tests.support import experiment
from tests.support.releases import release

pytestmark = pytest.mark.slow

Table = dict[str, dict[str, Any]]

SKIP: dict[str, Any] = {"dtype": "fp16", "loss_scale": 0, "overflow_window": 1}
MASKS = ("0111", "1110", "0001", "0110")


def stage_3(table: Table, *, devices: tuple[str, ...] = ("offload", "device")) -> Table:
    """Each with the optimizer's state on the host, and on the device."""
    return {
        f"{name}, {device}": {"stage": 3, "offload": device == "offload", **configuration}
        for device in devices
        for name, configuration in table.items()
    }


MASKED = stage_3({mask: {"mask": mask} for mask in MASKS})
ALSO_WRONG = stage_3(
    {
        "two micro-batches": {"ga": 2, "mask": "0110", "windows": 4},
        "boundary set by hand": {"mask": "0110", "driver": "accelerate"},
        "step only at the boundary": {"mask": "0110", "driver": "boundary"},
        "every backward a boundary": {"mask": "0110", "driver": "bare"},
        "clipping": {"mask": "0110", "clip": 0.05},
        "two groups, a small bucket": {"mask": "0110", "groups": 2, "bucket": 500, "side": 5},
        "frozen parameter": {"mask": "0110", "frozen": True},
        "reentrant checkpointing": {"mask": "0110", "checkpointing": "reentrant"},
        "offload_param": {"mask": "0110", "extra": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
        "fp32 sums of bf16": {"mask": "0110", "dtype": "bf16", "extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
        "torch autocast": {"mask": "0110", "dtype": "autocast"},
    },
    devices=("offload",),
)
UNUSED = stage_3({"one micro-batch": {"ga": 1, "mask": "101"}})  # a window that does not use it, between two that do
BF16 = stage_3({"bf16": {"mask": "0110", "dtype": "bf16"}})
SKIPPED = stage_3({"skip": {"mask": "0111", **SKIP}})
DENSE = stage_3(
    {"dense, fp32": {"clip": 0.05}, "dense, bf16": {"dtype": "bf16"}, "dense, small bucket": {"bucket": 500}}
)
DENSE |= stage_3(
    {
        "dense, fp16 with an overflow skip": SKIP,
        "dense, one micro-batch": {"ga": 1},
        "dense, engine of one driven by hand to four": {"driver": "accelerate"},
        "dense, reentrant checkpointing": {"checkpointing": "reentrant"},
    },
    devices=("offload",),
)
SPARED = "1110, device"  # what DeepSpeed does right by itself
UNMANAGED = stage_3(
    {
        f"unmanaged, {mask}": {"driver": "bare", "mask": mask, "extra": {"managed_gradient_accumulation": False}}
        for mask in ("0110", "1111")
    }
)
EVENTS = stage_3(
    {
        "resume": {"scenario": "resume", "mask": "0110"},
        "load": {"scenario": "load_in_mid_window", "driver": "boundary", "mask": "0110"},
        "destroy": {"scenario": "destroy", "mask": "0110"},
        "revert": {"scenario": "revert", "mask": "0001", "windows": 5},
    }
)
LATE = {"late import": {"scenario": "late_import", "stage": 3, "offload": False, "mask": "0001"}}
ONE_RANK = {**MASKED, **ALSO_WRONG, **UNUSED, **BF16, **SKIPPED, **DENSE, **UNMANAGED}
RANKS_MASKED = [name for name in MASKED if "0110" in name or "1110" in name]
RANKS_DENSE = [name for name in DENSE if "bf16" in name or "bucket" in name]
TWO_RANKS = {name: ONE_RANK[name] for name in [*RANKS_MASKED, *UNUSED, *BF16, *RANKS_DENSE]}
SHORT_MASKED = [name for name in MASKED if "0111" in name or "1110" in name]
SHORT = {name: ONE_RANK[name] for name in [*SHORT_MASKED, *UNUSED, *SKIPPED, "dense, fp32, offload"]}
KNOWN = "    def reset_cpu_buffers(self):\n        self.norm_for_param_grads = {}"
# What trainfix says of these where it refuses to repair; None: the error is not reached.
STOPPED = {
    "0111, device": "first micro-batch",
    "1110, offload": "last micro-batch, with offload_optimizer,",
    "one micro-batch, device": "micro-batches",
    SPARED: None,
    "dense, fp32, offload": None,
}
OTHERS = ["0.15.4"]  # the first of those that stage gradients in pinned memory; `make matrix` runs them all


@pytest.fixture(scope="module")
def before(runs):
    return runs("0.19.8", ONE_RANK, trainfix=False)


@pytest.fixture(scope="module")
def after(runs):
    return runs("0.19.8", {**ONE_RANK, **EVENTS}, trainfix=True)


@pytest.fixture(scope="module")
def before_ranks(runs):
    return runs("0.19.8", TWO_RANKS, trainfix=False, ranks=2)


@pytest.fixture(scope="module")
def after_ranks(runs):
    return runs("0.19.8", TWO_RANKS, trainfix=True, ranks=2)


def assert_released(result: dict[str, Any]) -> None:
    """What the released code gives the side branch, window after window."""
    mask, offload = result["configuration"]["mask"], result["configuration"]["offload"]
    used = [k for k, on in enumerate(mask) if on == "1"]
    lost = offload and mask[-1] == "0"
    repeated = mask[0] == "0" and not lost
    for number, window in enumerate(windows(result)):
        side = window["side"]
        assert [side["coefficients"][k] for k in used] == pytest.approx([0 if lost else 1] * len(used), abs=1e-3)
        earlier = [side["earlier"][4 * past + k] for past in range(number) for k in used]
        assert earlier == pytest.approx([1 if repeated else 0] * len(earlier), abs=1e-3)


def is_wrong(result: dict[str, Any]) -> bool:
    return any(window["relative_error"] > 0.05 for window in windows(result))


@pytest.mark.parametrize("name", MASKED)
def test_zero3_on_0_19_8_loses_or_repeats_what_some_micro_batches_do_not_use(before, name):
    assert_released(before[name])


@pytest.mark.parametrize("name", [*MASKED, *ALSO_WRONG, *UNUSED])
def test_zero3_on_0_19_8_is_right_with_trainfix(before, after, name):
    assert is_wrong(before[name]) or name == SPARED
    assert_right(after[name])
    assert states(after[name])["TF-0005"] == "applied"


@pytest.mark.parametrize("name", SHORT_MASKED)
@pytest.mark.parametrize("version", OTHERS)
def test_other_releases_lose_or_repeat_the_same_and_are_right_with_trainfix(runs, version, name):
    assert_released(runs(version, SHORT, trainfix=False)[name])
    assert_right(runs(version, SHORT, trainfix=True)[name])


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize("version", OTHERS)
def test_a_window_without_the_branch_repeats_an_earlier_one_only_without_trainfix(runs, version, name):
    used, unused, _ = windows(runs(version, SHORT, trainfix=False)[name])
    assert used["relative_error"] < 1e-6
    count = len(unused["side"]["earlier"])
    assert unused["side"]["earlier"] == pytest.approx([1] * count, abs=1e-3)
    assert_right(runs(version, SHORT, trainfix=True)[name])


@pytest.mark.parametrize("name", BF16)
def test_low_precision_on_0_19_8_loses_and_repeats_nothing_with_trainfix(before, after, name):
    """Its sums stray by themselves, in the type that DeepSpeed sums in."""
    assert is_wrong(before[name])
    for window in windows(after[name]):
        assert window["relative_error"] < 1e-2
        assert window["global_norm_ratio"] == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", SKIPPED)
@pytest.mark.parametrize("version", [*OTHERS, "0.19.8"])
def test_after_an_overflow_only_trainfix_lets_training_go_on(request, runs, version, name):
    """Without it the infinities stay in the buffer of the branch, which the next window adds to."""
    if version == "0.19.8":
        old, new = (request.getfixturevalue(fixture)[name] for fixture in ("before", "after"))
    else:
        old, new = (runs(version, SHORT, trainfix=trainfix)[name] for trainfix in (False, True))
    assert old["error"] is None and new["error"] is None
    assert [window["skipped"] for window in old["windows"]] == [False, True, True]
    assert [window["skipped"] for window in new["windows"]] == [False, True, False]
    assert new["windows"][2]["relative_error"] < 1e-2


@pytest.mark.parametrize("name", [*DENSE, SPARED])
def test_what_0_19_8_does_right_stays_the_same_bit_for_bit(before, after, name):
    assert not is_wrong(before[name])
    assert_same_bits(before[name], after[name])


@pytest.mark.parametrize("version", OTHERS)
def test_a_model_that_uses_everything_stays_the_same_bit_for_bit(runs, version):
    old, new = (runs(version, SHORT, trainfix=trainfix)["dense, fp32, offload"] for trainfix in (False, True))
    assert not is_wrong(old)
    assert_same_bits(old, new)


@pytest.mark.parametrize("name", UNMANAGED)
def test_windows_that_the_engine_does_not_manage_are_right_with_trainfix(before, after, name):
    assert is_wrong(before[name]) == ("0110" in name)
    for window in windows(after[name]):
        window["safe_norm_ratio"] = None  # the master gradient is made in step() there
    assert_right(after[name])


@pytest.mark.parametrize("name", [*RANKS_MASKED, *UNUSED])
def test_two_ranks_on_0_19_8_are_right_only_with_trainfix(before_ranks, after_ranks, name):
    if name in MASKED:
        assert_released(before_ranks[name])
    assert is_wrong(before_ranks[name]) or name == SPARED
    assert_right(after_ranks[name])


@pytest.mark.parametrize("name", BF16)
def test_two_ranks_in_low_precision_lose_and_repeat_nothing_with_trainfix(before_ranks, after_ranks, name):
    assert is_wrong(before_ranks[name])
    assert not is_wrong(after_ranks[name])


@pytest.mark.parametrize("name", RANKS_DENSE)
def test_what_two_ranks_do_right_stays_the_same_bit_for_bit(before_ranks, after_ranks, name):
    assert not is_wrong(before_ranks[name])
    assert_same_bits(before_ranks[name], after_ranks[name])


@pytest.mark.parametrize("name", [name for name in EVENTS if "revert" not in name])
def test_resume_load_and_destroy_leave_nothing_behind(after, name):
    assert_right(after[name])
    assert after[name].get("resumed") == after[name].get("uninterrupted")


@pytest.mark.parametrize("name", ["revert, offload", "revert, device"])
def test_revert_in_mid_window_lets_that_window_finish(after, name):
    """Reverted in the middle of the second window, applied again in the middle of the fourth."""
    first, second, third, fourth, fifth = windows(after[name])
    for window in (first, second, fifth):
        assert_window_right(window)
    for window in (third, fourth):
        assert window["relative_error"] > 0.05
    assert "TF-0005" in after[name]["back"]
    assert after[name]["left on the optimizer"] == []


def test_import_in_mid_window_repairs_the_next_window(runs):
    result = runs("0.19.8", LATE, trainfix=False, env={"TRAINFIX": "on"})["late import"]
    assert result["error"] is None
    _, during, late = result["in mid-window"]
    assert during["relative_error"] > 0.05
    assert_window_right(late)
    for name in ("before its first window", "step captured"):
        for window in result[name]:
            assert_window_right(window)


def test_a_body_that_nobody_has_read_is_left_alone_and_stops_the_run_that_reaches_the_error(tmp_path):
    """0.19.8, in which a function that the repair relies on is written in another way."""
    altered = tmp_path / "altered"
    shutil.copytree(release("0.19.8"), altered)
    source = altered / "deepspeed/runtime/zero/stage3.py"
    text = source.read_text(encoding="utf-8")
    assert text.count(KNOWN) == 1
    source.write_text(text.replace(KNOWN, KNOWN.replace("{}", "dict()")), encoding="utf-8")
    table = {name: ONE_RANK[name] for name in STOPPED}
    results = dict(zip(table, experiment.run(altered, list(table.values()), trainfix=True), strict=True))
    for name, words in STOPPED.items():
        assert states(results[name])["TF-0005"] == "refused"
        if words is None:
            assert len(windows(results[name])) == 3
        else:
            assert results[name]["error"].startswith("UnfixedBugError: TF-0005 is reached and not repaired")
            assert f"a parameter that the window's {words} did not use" in results[name]["error"]
