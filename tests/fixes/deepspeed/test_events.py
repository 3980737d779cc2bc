"""TF-0001 and TF-0003: what happens in the middle of a window, and between engines."""

from __future__ import annotations

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import (
    assert_loses,
    assert_right,
    assert_window_loses,
    assert_window_right,
    states,
    windows,
)

pytestmark = pytest.mark.slow
WITH_OFFLOAD = [name for name, asked in tables.ZERO_GRAD.items() if asked["offload"]]


@pytest.mark.parametrize("version", ["0.15.1", "0.19.8"])
@pytest.mark.parametrize("name", tables.ZERO_GRAD)
def test_zero_grad_in_mid_window_takes_nothing_back_on_a_healthy_release(runs, version, name):
    if version == "0.15.1":
        assert_right(runs(version, tables.EARLY_RELEASE, trainfix=False)[name])
    else:
        assert_right(runs(version, tables.HEALTHY_RELEASE, trainfix=False, env={"TRAINFIX": "on"})[name])


@pytest.mark.parametrize("name", WITH_OFFLOAD)
def test_zero_grad_in_mid_window_does_the_same_on_0_18_9_with_trainfix(unpatched, repaired, name):
    assert_loses(unpatched[name], [1, 0, 0, 1])
    assert_right(repaired[name])


@pytest.mark.parametrize("name", ["resume", "resume, bf16"])
def test_a_resumed_run_on_0_18_9_ends_with_the_parameters_of_an_uninterrupted_one(repaired, name):
    assert_right(repaired[name])
    assert repaired[name]["resumed"] == repaired[name]["uninterrupted"]


def test_a_resumed_run_on_two_ranks_ends_with_the_parameters_of_an_uninterrupted_one(repaired_ranks):
    assert_right(repaired_ranks["resume, bf16"])
    assert repaired_ranks["resume, bf16"]["resumed"] == repaired_ranks["resume, bf16"]["uninterrupted"]


@pytest.mark.parametrize("name", ["load in mid-window", "load in mid-window, bf16"])
def test_a_checkpoint_loaded_in_mid_window_ends_that_window_on_0_18_9(unpatched, repaired, name):
    """Without trainfix the first window after it holds a part of the one that was given up."""
    assert windows(unpatched[name])[2]["residual"] > 0.1
    assert_right(repaired[name])
    assert repaired[name]["resumed"] == repaired[name]["uninterrupted"]


@pytest.mark.parametrize("name", tables.LOAD_WITHOUT_STATES)
def test_weights_loaded_in_mid_window_let_that_window_go_on_as_on_0_19_8(runs, repaired, name):
    """DeepSpeed then loads nothing into the ZeRO optimizer, so that what it holds of the window stays."""
    healthy = runs("0.19.8", tables.HEALTHY_RELEASE, trainfix=False, env={"TRAINFIX": "on"})[name]
    for result in (healthy, repaired[name]):
        first, second, third = windows(result)
        assert_window_right(first)
        assert_window_right(second)
        assert third["residual"] > 0.1
    assert repaired[name]["resumed"] == healthy["resumed"]


def test_a_checkpoint_loaded_in_mid_window_on_two_ranks_ends_that_window(repaired_ranks):
    assert_right(repaired_ranks["load in mid-window"])
    assert repaired_ranks["load in mid-window"]["resumed"] == repaired_ranks["load in mid-window"]["uninterrupted"]


@pytest.mark.parametrize("name", [tables.UNUSED, tables.UNUSED_PARTITION])
@pytest.mark.parametrize("ranks", ["", "_ranks"])
def test_what_a_whole_window_leaves_unused_on_0_18_9_gets_zero_only_with_trainfix(request, name, ranks):
    """Without trainfix the optimizer consumes its gradient of the window before once more."""
    _, stale, _ = windows(request.getfixturevalue(f"unpatched{ranks}")[name])
    assert stale["residual"] > 0.05
    assert_right(request.getfixturevalue(f"repaired{ranks}")[name])


def test_several_engines_on_0_18_9_keep_their_windows_apart(unpatched, repaired):
    """Whole windows of three micro-batches run in the middle of windows of four."""
    for window in windows(unpatched["several engines"]):
        assert_window_loses(window, [1, *[0] * (len(window["coefficients"]) - 2), 1])
    assert_right(repaired["several engines"])
    assert [len(window["coefficients"]) for window in windows(repaired["several engines"])] == [3, 4] * 3


@pytest.mark.parametrize("name", ["destroy", "destroy, bf16"])
def test_an_engine_destroyed_in_mid_window_leaves_nothing_to_the_next_on_0_18_9(unpatched, repaired, name):
    assert_loses(unpatched[name], [1, 0, 0, 1])
    assert_right(repaired[name])


def test_an_engine_destroyed_in_mid_window_on_two_ranks_leaves_nothing_to_the_next(repaired_ranks):
    assert_right(repaired_ranks["destroy"])


@pytest.mark.parametrize("name", ["safe gradients", "safe gradients, two groups"])
def test_safe_get_full_grad_on_0_18_9_is_what_the_optimizer_then_consumes(repaired, name):
    assert_right(repaired[name])
    assert repaired[name]["safe"] == [window["sha256"] for window in windows(repaired[name])]


def test_safe_get_full_grad_on_two_ranks_is_what_the_optimizer_then_consumes(repaired_ranks):
    result = repaired_ranks["safe gradients"]
    assert_right(result)
    assert result["safe"] == [window["sha256"] for window in windows(result)]


def test_revert_in_mid_window_lets_that_window_finish_on_0_18_9(repaired):
    """Reverted in the middle of the second window, applied again in the middle of the fourth."""
    result = repaired["revert"]
    first, second, third, fourth, fifth = windows(result)
    assert_window_right(first)
    assert_window_right(second)
    assert_window_loses(third, [1, 0, 0, 1])
    assert_window_loses(fourth, [1, 0, 0, 1])
    assert_window_right(fifth)
    assert {"TF-0001", "TF-0003", "TF-0004"} <= set(result["back"])
    assert result["left on the optimizer"] == []
    assert states(result).items() >= {"TF-0001": "applied", "TF-0003": "applied"}.items()


def late_import(runs, version, table):
    result = runs(version, table, trainfix=False, env={"TRAINFIX": "on"})["late import"]
    assert result["error"] is None
    return result


def test_import_in_mid_window_repairs_the_next_window_on_0_18_9(runs):
    before, during, after = late_import(runs, "0.18.9", tables.LATE)["in mid-window"]
    assert_window_loses(before, [1, 0, 0, 1])
    assert_window_loses(during, [1, 0, 0, 1])
    assert_window_right(after)


def test_import_after_the_engine_was_built_repairs_its_first_window_on_0_18_9(runs):
    for window in late_import(runs, "0.18.9", tables.LATE)["before its first window"]:
        assert_window_right(window)


def test_a_scheduler_that_captured_the_optimizers_step_before_changes_nothing_on_0_18_9(runs):
    result = late_import(runs, "0.18.9", tables.LATE)
    for window in result["step captured"]:
        assert_window_right(window)
    assert result["counted"] == len(result["step captured"])


@pytest.mark.parametrize("version", ["0.15.1", "0.18.9"])
def test_a_late_import_repairs_an_engine_of_one_step_driven_to_four(runs, version):
    """Up to 0.15.1 DeepSpeed counts the micro-batches of an optimizer's first window from 1, later ones' from 0."""
    result = late_import(runs, version, tables.LATE_LONE)
    before, during, after = result["in mid-window"]
    assert_window_loses(before, [0, 0, 0, 1])
    assert_window_loses(during, [0, 0, 0, 1])
    assert_window_right(after)
    for window in result["before its first window"]:
        assert_window_right(window)


@pytest.mark.parametrize("name", ["calls", "calls, small buckets"])
def test_each_bucket_on_0_18_9_goes_to_the_host_in_one_call(repaired, name):
    calls = repaired[name]["calls"]
    assert repaired[name]["error"] is None
    assert calls["accumulate"] == calls["buckets"] > 0
    assert calls["segments"] == 4 * calls["parameters"]


@pytest.mark.parametrize("name", ["calls", "calls, small buckets"])
def test_the_repair_on_0_18_9_waits_for_no_more_scalars_than_deepspeed(unpatched, repaired, name):
    """Per window: DeepSpeed reads one overflow flag per parameter at the boundary, the repair one before the step."""
    assert 0 < repaired[name]["calls"]["scalars"] <= unpatched[name]["calls"]["scalars"]
