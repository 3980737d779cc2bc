"""TF-0002: what ZeRO-2 without offload gives the optimizer, without trainfix and with it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixes.deepspeed.judging import (
    assert_loses,
    assert_right,
    assert_same_bits,
    assert_window_loses,
    assert_window_right,
    coefficients,
    states,
    windows,
)

pytestmark = pytest.mark.slow

Table = dict[str, dict[str, Any]]

SMALL: dict[str, Any] = {"bucket": 500}  # elements; one of the model's parameters has 1369, more than such a bucket
FP32_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}


def without_offload(table: Table) -> Table:
    return {name: {"offload": False, **configuration} for name, configuration in table.items()}


LOSING = without_offload(
    {
        "fp32": {},
        "two micro-batches": {"ga": 2},
        "eight micro-batches": {"ga": 8},
        "step only at the boundary": {"driver": "boundary"},
        "engine of one driven by hand to four": {"driver": "accelerate"},
        "overlap, small buckets": {"overlap": True, **SMALL},
        "no overlap, small buckets": {"overlap": False, **SMALL},
        "two parameter groups": {"groups": 2},
        "frozen parameter": {"frozen": True},
        "clipping": {"clip": 0.1},
        "reentrant checkpointing": {"checkpointing": "reentrant", **SMALL},
        "non-reentrant checkpointing": {"checkpointing": "nonreentrant"},
        **{f"side branch in micro-batches {mask}": {"mask": mask} for mask in ("0111", "1110", "1000", "0001")},
    }
)
# DeepSpeed sums in the gradients' own dtype here, whatever data_types.grad_accum_dtype says.
LOW_PRECISION = without_offload(
    {
        "bf16": {"dtype": "bf16"},
        "bf16 with fp32 accumulation asked for": {"dtype": "bf16", "extra": FP32_SUMS},
        "fp16": {"dtype": "fp16"},
        "fp16 with an overflow skip": {"dtype": "fp16", "loss_scale": 0, "overflow_window": 1, "windows": 4},
        "torch autocast": {"dtype": "autocast"},
    }
)
ONE_RANK_LOSING = {**LOSING, **LOW_PRECISION, "round robin": {"offload": False, "round_robin": True}}
HANDED_OVER: Table = {
    "one micro-batch": {"offload": False, "ga": 1, "clip": 0.5},
    "one micro-batch, bf16": {"offload": False, "ga": 1, "dtype": "bf16"},
    "stage 1": {"offload": False, "stage": 1},
    "stage 1, bf16, small buckets": {"offload": False, "stage": 1, "dtype": "bf16", **SMALL},
}
EVENTS = without_offload(
    {
        "load": {"scenario": "load_in_mid_window", "driver": "boundary"},
        "zero_grad": {"scenario": "zero_grad", "call": "engine.zero_grad"},
        "destroy": {"scenario": "destroy"},
        "unused window": {"scenario": "unused_window"},
        "safe gradients": {"scenario": "safe_gradients", "groups": 2},
        "resume": {"scenario": "resume", "dtype": "bf16"},
        "revert": {"scenario": "revert", "windows": 5},
    }
)
LATE = without_offload({"late import": {"scenario": "late_import"}})  # the last in its child: until then it is bare
UNTOUCHED: Table = {"untouched": {"scenario": "untouched"}, "fp32": {"offload": False}}
ONE_RANK: Table = {**ONE_RANK_LOSING, **HANDED_OVER}
RANKS_LOSING = [*LOW_PRECISION, *(name for name in LOSING if "checkpointing" not in name and "boundary" not in name)]
TWO_RANKS: Table = {name: ONE_RANK[name] for name in [*RANKS_LOSING, *HANDED_OVER]} | {"load": EVENTS["load"]}


@pytest.fixture
def unpatched(runs):
    return runs("0.18.2", {**ONE_RANK, **LATE}, trainfix=False, env={"TRAINFIX": "on"})


@pytest.fixture
def repaired(runs):
    return runs("0.18.2", {**ONE_RANK, **EVENTS}, trainfix=True)


@pytest.fixture
def unpatched_ranks(runs):
    return runs("0.18.2", TWO_RANKS, trainfix=False, ranks=2)


@pytest.fixture
def repaired_ranks(runs):
    return runs("0.18.2", TWO_RANKS, trainfix=True, ranks=2)


@pytest.fixture
def fixed_upstream(runs):
    """0.18.3, the first release that is right again."""
    return runs("0.18.3", {**ONE_RANK, "untouched": UNTOUCHED["untouched"]}, trainfix=False, env={"TRAINFIX": "on"})


def assert_only_the_last(result):
    steps = len(windows(result)[0]["coefficients"])
    assert_loses(result, [0] * (steps - 1) + [1])


def assert_right_within_its_dtype(result):
    """The sum of four or eight is rounded: in fp16 to 4e-4, in bf16 to 4e-3."""
    for window in windows(result):
        assert coefficients(window) == pytest.approx([1] * len(window["coefficients"]), abs=1e-2)
        assert window["captured"]["relative_error"] < 5e-3
        assert window["earlier"] == pytest.approx([0] * len(window["earlier"]), abs=2e-2)
        assert window["global_norm_ratio"] == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", ONE_RANK_LOSING)
def test_zero2_without_offload_on_0_18_2_keeps_the_last_micro_batch_alone(unpatched, name):
    assert_only_the_last(unpatched[name])


@pytest.mark.parametrize("name", [*LOSING, "round robin"])
def test_zero2_without_offload_on_0_18_2_keeps_every_micro_batch_with_trainfix(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0002"] == "applied"


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_low_precision_on_0_18_2_is_right_within_its_rounding_with_trainfix(repaired, name):
    assert_right_within_its_dtype(repaired[name])


@pytest.mark.parametrize("name", ONE_RANK)
def test_with_trainfix_0_18_2_gives_the_bits_of_0_18_3(repaired, fixed_upstream, name):
    assert_same_bits(repaired[name], fixed_upstream[name])


@pytest.mark.parametrize("name", HANDED_OVER)
@pytest.mark.parametrize("ranks", ["", "_ranks"])
def test_what_0_18_2_does_right_stays_the_same_bit_for_bit(request, ranks, name):
    before, after = (request.getfixturevalue(f"{which}{ranks}")[name] for which in ("unpatched", "repaired"))
    for window in windows(before):
        assert window["relative_error"] < 1e-2
    assert_same_bits(before, after)


@pytest.mark.parametrize("name", RANKS_LOSING)
def test_two_ranks_on_0_18_2_keep_the_last_micro_batch_alone(unpatched_ranks, name):
    assert_only_the_last(unpatched_ranks[name])


@pytest.mark.parametrize("name", RANKS_LOSING)
def test_two_ranks_on_0_18_2_keep_every_micro_batch_with_trainfix(repaired_ranks, name):
    (assert_right_within_its_dtype if name in LOW_PRECISION else assert_right)(repaired_ranks[name])


def test_the_first_affected_release_loses_the_same_and_keeps_all_with_trainfix(runs):
    table = {name: ONE_RANK[name] for name in ("fp32", "eight micro-batches", "side branch in micro-batches 0111")}
    for name, result in runs("0.17.6", table, trainfix=False).items():
        assert_only_the_last(result)
        repaired = runs("0.17.6", table, trainfix=True)[name]
        assert_right(repaired)
        assert states(repaired)["TF-0002"] == "applied"


def test_the_release_before_is_right_and_stays_untouched(runs):
    results = runs("0.17.5", UNTOUCHED, trainfix=True)
    assert_right(results["fp32"])
    assert states(results["fp32"])["TF-0002"] == "not-affected"
    assert not {name for name in results["untouched"]["wrapped by trainfix"] if "grad_tensors" in name}


def test_the_release_after_is_right_and_stays_untouched(fixed_upstream):
    assert_right(fixed_upstream["fp32"])
    assert states(fixed_upstream["untouched"])["TF-0002"] == "fixed-upstream"
    assert "DeepSpeedZeroOptimizer.get_all_grad_tensors" not in fixed_upstream["untouched"]["wrapped by trainfix"]


@pytest.mark.parametrize("name", ["zero_grad", "destroy", "unused window"])
def test_events_on_0_18_2_leave_windows_whole_with_trainfix(repaired, name):
    assert_right(repaired[name])


@pytest.mark.parametrize("ranks", ["", "_ranks"])
def test_a_checkpoint_loaded_in_mid_window_ends_that_window_on_0_18_2(request, ranks):
    result = request.getfixturevalue(f"repaired{ranks}")["load"]
    assert_right(result)
    assert result["resumed"] == result["uninterrupted"]


def test_a_run_resumed_on_0_18_2_ends_with_the_parameters_of_an_uninterrupted_one(repaired):
    assert_right_within_its_dtype(repaired["resume"])
    assert repaired["resume"]["resumed"] == repaired["resume"]["uninterrupted"]


def test_safe_get_full_grad_on_0_18_2_is_what_the_optimizer_then_consumes(repaired):
    result = repaired["safe gradients"]
    assert_right(result)
    assert result["safe"] == [window["sha256"] for window in windows(result)]


def test_revert_and_apply_in_mid_window_take_effect_at_the_next_on_0_18_2(repaired):
    """Reverted in the middle of the second window, applied again in the middle of the fourth."""
    result = repaired["revert"]
    first, second, third, fourth, fifth = windows(result)
    for right in (first, second, fifth):
        assert_window_right(right)
    for wrong in (third, fourth):
        assert_window_loses(wrong, [0, 0, 0, 1])
    assert "TF-0002" in result["back"]
    assert result["left on the optimizer"] == []


def test_import_in_mid_window_repairs_the_next_window_on_0_18_2(unpatched):
    result = unpatched["late import"]
    assert result["error"] is None
    before, during, after = result["in mid-window"]
    assert_window_loses(before, [0, 0, 0, 1])
    assert_window_loses(during, [0, 0, 0, 1])
    assert_window_right(after)
    for window in result["before its first window"]:
        assert_window_right(window)
