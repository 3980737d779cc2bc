"""TF-0001 and TF-0003: what ZeRO-2 with CPU offload gives the optimizer, without trainfix and with it.

Every entry of a table is run on the release that its test names, three windows of different data, on the CPU.
"""

from __future__ import annotations

import pytest

from tests.fixes.deepspeed.judging import assert_loses, assert_right, assert_same_bits, states, windows

SMALL = {"bucket": 500}  # elements; the model has a parameter of 1369, so this is also one larger than a bucket

LOSING = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "fp16 with a static loss scale": {"dtype": "fp16"},
    "fp16 with an overflow skip": {"dtype": "fp16", "loss_scale": 0, "overflow_window": 1, "windows": 4},
    "torch autocast": {"dtype": "autocast"},
    "bf16 with fp32 accumulation asked for": {"dtype": "bf16", "extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "no overlap": {"overlap": False},
    "overlap": {"overlap": True},
    "small buckets": {**SMALL, "overlap": False},
    "small buckets and overlap": {**SMALL, "overlap": True},
    "frozen parameter": {"frozen": True},
    "two parameter groups": {"groups": 2},
    "clipping": {"clip": 0.1},
    "clipping, fp16": {"clip": 0.1, "dtype": "fp16"},
    "reentrant checkpointing": {"checkpointing": "reentrant"},
    "non-reentrant checkpointing": {"checkpointing": "nonreentrant"},
    "reentrant checkpointing, small buckets": {"checkpointing": "reentrant", **SMALL},
    "three micro-batches": {"ga": 3},
    "eight micro-batches": {"ga": 8},
    "eight micro-batches, reentrant checkpointing": {"ga": 8, "checkpointing": "reentrant"},
    "step only at the boundary": {"driver": "boundary"},
    "engine of two driven by hand to four": {"driver": "accelerate", "engine_steps": 2},
    "nvme offload, which stage 2 treats as cpu": {"extra": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
}

LONE = {  # engine with one accumulation step, four backward() per step: TF-0003
    "boundary set by hand": {"driver": "accelerate"},
    "boundary set by hand, bf16": {"driver": "accelerate", "dtype": "bf16"},
    "boundary set by hand, clipping": {"driver": "accelerate", "clip": 0.1},
    "boundary never set": {"driver": "bare"},
}

CONDITIONAL = {f"side branch in micro-batches {mask}": {"mask": mask} for mask in ("0111", "1110", "1000", "0001", "0110")}

HANDED_OVER = {
    f"{steps} micro-batch(es), {dtype}, checkpointing: {checkpointing or 'none'}": {
        "ga": steps,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "clip": 0.5,
    }
    for steps in (1, 2)
    for dtype in ("fp32", "bf16")
    for checkpointing in ("", "reentrant", "nonreentrant")
} | {
    "stage 1 with offload, fp32": {"stage": 1},
    "stage 1 with offload, bf16": {"stage": 1, "dtype": "bf16"},
    "stage 1 with offload, fp16": {"stage": 1, "dtype": "fp16"},
    "stage 1 with offload, eight micro-batches, small buckets": {"stage": 1, "ga": 8, **SMALL},
    "stage 2 without offload": {"offload": False},
    "stage 2 without offload, bf16": {"offload": False, "dtype": "bf16"},
    "two micro-batches, fp16 with an overflow skip": {
        **{"ga": 2, "dtype": "fp16", "loss_scale": 0, "overflow_window": 1, "windows": 4}
    },
    "two micro-batches, step only at the boundary": {"ga": 2, "driver": "boundary"},
}

TWO_RANKS = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "torch autocast": {"dtype": "autocast"},
    "fp16 with an overflow skip": LOSING["fp16 with an overflow skip"],
    "small buckets": {**SMALL, "overlap": False},
    "small buckets and overlap": {**SMALL, "overlap": True},
    "frozen parameter": {"frozen": True},
    "two parameter groups and clipping": {"groups": 2, "clip": 0.1},
    "reentrant checkpointing": {"checkpointing": "reentrant"},
    "step only at the boundary": {"driver": "boundary"},
    "round_robin_gradients": {"round_robin": True},
}
TWO_RANKS_LONE = {"boundary set by hand": {"driver": "accelerate"}}
TWO_RANKS_HANDED_OVER = {
    "two micro-batches, fp32": {"ga": 2},
    "two micro-batches, bf16": {"ga": 2, "dtype": "bf16"},
    "stage 1 with offload": {"stage": 1},
}

ONE_RANK_TABLE = {**LOSING, **LONE, **CONDITIONAL, **HANDED_OVER}
TWO_RANKS_TABLE = {**TWO_RANKS, **TWO_RANKS_LONE, **TWO_RANKS_HANDED_OVER}


def first_and_last(result):
    count = len(windows(result)[0]["coefficients"])
    return [1] + [0] * (count - 2) + [1]


@pytest.mark.parametrize("name", LOSING)
def test_zero2_offload_on_0_18_9_loses_the_middle_micro_batches(runs, name):
    result = runs("0.18.9", ONE_RANK_TABLE, trainfix=False)[name]
    assert_loses(result, first_and_last(result))


@pytest.mark.parametrize("name", LOSING)
def test_zero2_offload_on_0_18_9_keeps_every_micro_batch_with_trainfix(runs, name):
    result = runs("0.18.9", ONE_RANK_TABLE, trainfix=True)[name]
    assert_right(result)
    assert states(result)["TF-0001"] == "applied"


@pytest.mark.parametrize("name", LONE)
def test_an_engine_of_one_step_driven_to_four_on_0_18_9_loses_all_but_the_last(runs, name):
    assert_loses(runs("0.18.9", ONE_RANK_TABLE, trainfix=False)[name], [0, 0, 0, 1])


@pytest.mark.parametrize("name", LONE)
def test_an_engine_of_one_step_driven_to_four_on_0_18_9_keeps_all_with_trainfix(runs, name):
    assert_right(runs("0.18.9", ONE_RANK_TABLE, trainfix=True)[name])


@pytest.mark.parametrize("version", ["0.14.5", "0.15.1"])
@pytest.mark.parametrize("name", LONE)
def test_releases_before_0_15_2_lose_the_same_and_keep_all_with_trainfix(runs, version, name):
    assert_loses(runs(version, LONE, trainfix=False)[name], [0, 0, 0, 1])
    repaired = runs(version, LONE, trainfix=True)[name]
    assert_right(repaired)
    assert states(repaired) == {"TF-0001": "not-affected", "TF-0003": "applied"}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_branch_unused_in_some_micro_batches_on_0_18_9_is_right_with_trainfix(runs, name):
    wrong = windows(runs("0.18.9", ONE_RANK_TABLE, trainfix=False)[name])
    assert all(window["relative_error"] > 0.1 for window in wrong)
    assert_right(runs("0.18.9", ONE_RANK_TABLE, trainfix=True)[name])


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_0_18_9_does_right_stays_the_same_bit_for_bit(runs, name):
    unpatched, patched = (runs("0.18.9", ONE_RANK_TABLE, trainfix=trainfix)[name] for trainfix in (False, True))
    assert_same_bits(unpatched, patched)
    for window in windows(unpatched):
        assert window["relative_error"] < 1e-2


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_on_0_18_9_lose_the_middle_micro_batches(runs, name):
    assert_loses(runs("0.18.9", TWO_RANKS_TABLE, trainfix=False, ranks=2)[name], [1, 0, 0, 1])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_on_0_18_9_keep_every_micro_batch_with_trainfix(runs, name):
    assert_right(runs("0.18.9", TWO_RANKS_TABLE, trainfix=True, ranks=2)[name])


@pytest.mark.parametrize("name", TWO_RANKS_LONE)
def test_two_ranks_with_an_engine_of_one_step_lose_all_but_the_last_and_keep_all_with_trainfix(runs, name):
    assert_loses(runs("0.18.9", TWO_RANKS_TABLE, trainfix=False, ranks=2)[name], [0, 0, 0, 1])
    assert_right(runs("0.18.9", TWO_RANKS_TABLE, trainfix=True, ranks=2)[name])


@pytest.mark.parametrize("name", TWO_RANKS_HANDED_OVER)
def test_what_two_ranks_on_0_18_9_do_right_stays_the_same_bit_for_bit(runs, name):
    unpatched, patched = (runs("0.18.9", TWO_RANKS_TABLE, trainfix=on, ranks=2)[name] for on in (False, True))
    assert_same_bits(unpatched, patched)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_window_leaves_nothing_behind(runs, ranks):
    """fp16 with a dynamic loss scale on 0.18.9: the second window overflows, is skipped, and halves the scale."""
    table = TWO_RANKS_TABLE if ranks == 2 else ONE_RANK_TABLE
    result = runs("0.18.9", table, trainfix=True, ranks=ranks)["fp16 with an overflow skip"]
    before, skipped, after, last = result["windows"]
    assert [window["skipped"] for window in (before, skipped, after, last)] == [False, True, False, False]
    assert after["loss_scale"] == before["loss_scale"] / 2
    # The skipped window's targets were 10**4 times as large: the smallest part of its gradient would be seen.
    assert after["earlier"][4:8] == pytest.approx([0] * 4, abs=1e-6)


def test_clipping_on_0_18_9_acts_on_the_whole_sum(runs):
    """The consumed gradient has the norm of the clipping threshold, which is below what arrived."""
    for window in windows(runs("0.18.9", ONE_RANK_TABLE, trainfix=True)["clipping"]):
        assert window["consumed_norm"] == pytest.approx(0.1, rel=1e-4)
        assert window["norm_ratio"] == pytest.approx(1, abs=1e-5)
