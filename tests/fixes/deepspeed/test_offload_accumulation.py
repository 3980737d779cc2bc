"""TF-0001 and TF-0003: what ZeRO-2 with CPU offload gives the optimizer, without trainfix and with it."""

from __future__ import annotations

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import assert_loses, assert_right, assert_same_bits, states, windows


def first_and_last(result):
    count = len(windows(result)[0]["coefficients"])
    return [1] + [0] * (count - 2) + [1]


@pytest.mark.parametrize("name", tables.LOSING)
def test_zero2_offload_on_0_18_9_loses_the_middle_micro_batches(unpatched, name):
    assert_loses(unpatched[name], first_and_last(unpatched[name]))


@pytest.mark.parametrize("name", tables.LOSING)
def test_zero2_offload_on_0_18_9_keeps_every_micro_batch_with_trainfix(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0001"] == "applied"


@pytest.mark.parametrize("name", tables.LONE)
def test_an_engine_of_one_step_driven_to_four_on_0_18_9_loses_all_but_the_last(unpatched, name):
    assert_loses(unpatched[name], [0, 0, 0, 1])


@pytest.mark.parametrize("name", tables.LONE)
def test_an_engine_of_one_step_driven_to_four_on_0_18_9_keeps_all_with_trainfix(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0003"] == "applied"


@pytest.mark.parametrize("version", ["0.14.5", "0.15.1"])
@pytest.mark.parametrize("name", tables.LONE)
def test_releases_before_0_15_2_lose_the_same_and_keep_all_with_trainfix(runs, version, name):
    assert_loses(runs(version, tables.EARLY_RELEASE, trainfix=False)[name], [0, 0, 0, 1])
    repaired = runs(version, tables.EARLY_RELEASE, trainfix=True)[name]
    assert_right(repaired)
    assert states(repaired).items() >= {"TF-0001": "not-affected", "TF-0003": "applied"}.items()


@pytest.mark.parametrize("name", tables.CONDITIONAL)
def test_a_branch_unused_in_some_micro_batches_on_0_18_9_is_right_with_trainfix(unpatched, repaired, name):
    for window in windows(unpatched[name]):
        assert window["relative_error"] > 0.1
    assert_right(repaired[name])


@pytest.mark.parametrize("name", tables.HANDED_OVER)
def test_what_0_18_9_does_right_stays_the_same_bit_for_bit(unpatched, repaired, name):
    for window in windows(unpatched[name]):
        assert window["relative_error"] < 1e-2
    assert_same_bits(unpatched[name], repaired[name])


@pytest.mark.parametrize("name", tables.BARE)
def test_a_loop_in_which_every_backward_is_a_boundary_is_left_alone_on_0_18_9(unpatched, repaired, name):
    assert_loses(unpatched[name], [0, 0, 0, 1])
    assert_same_bits(unpatched[name], repaired[name])


@pytest.mark.parametrize("name", tables.TWO_RANKS)
def test_two_ranks_on_0_18_9_lose_the_middle_micro_batches(unpatched_ranks, name):
    assert_loses(unpatched_ranks[name], [1, 0, 0, 1])


@pytest.mark.parametrize("name", tables.TWO_RANKS)
def test_two_ranks_on_0_18_9_keep_every_micro_batch_with_trainfix(repaired_ranks, name):
    assert_right(repaired_ranks[name])


@pytest.mark.parametrize("name", tables.TWO_RANKS_LONE)
def test_two_ranks_with_an_engine_of_one_step_keep_all_only_with_trainfix(unpatched_ranks, repaired_ranks, name):
    assert_loses(unpatched_ranks[name], [0, 0, 0, 1])
    assert_right(repaired_ranks[name])


@pytest.mark.parametrize("name", tables.TWO_RANKS_HANDED_OVER)
def test_what_two_ranks_on_0_18_9_do_right_stays_the_same_bit_for_bit(unpatched_ranks, repaired_ranks, name):
    for window in windows(unpatched_ranks[name]):
        assert window["relative_error"] < 1e-2
    assert_same_bits(unpatched_ranks[name], repaired_ranks[name])


@pytest.mark.parametrize("ranks", ["repaired", "repaired_ranks"])
def test_a_skipped_window_leaves_nothing_behind(request, ranks):
    """fp16 with a dynamic loss scale on 0.18.9: the second window overflows, is skipped, and halves the scale."""
    result = request.getfixturevalue(ranks)["fp16 with an overflow skip"]
    before, skipped, after, last = result["windows"]
    assert [window["skipped"] for window in (before, skipped, after, last)] == [False, True, False, False]
    assert after["loss_scale"] == before["loss_scale"] / 2
    # Its targets were 10**4 times as large: the smallest part of its gradient would be seen.
    assert after["earlier"][4:8] == pytest.approx([0] * 4, abs=1e-6)
    assert after["captured"]["relative_error"] < 1e-6


def test_clipping_on_0_18_9_acts_on_the_whole_sum(repaired):
    """The consumed gradient has the norm of the threshold, 0.1, which is below that of what arrived."""
    for window in windows(repaired["clipping"]):
        assert window["consumed_norm"] == pytest.approx(0.1, rel=1e-4)
        assert window["norm_ratio"] == pytest.approx(1, abs=1e-5)
