"""TF-0006: what ZeRO-1 with an accumulation dtype of its own gives the optimizer, without trainfix and with it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixes.deepspeed.judging import assert_same_bits, states, windows

pytestmark = pytest.mark.slow

Table = dict[str, dict[str, Any]]

SMALL: dict[str, Any] = {"bucket": 500}  # elements; one of the model's parameters has 1369, more than such a bucket
FP32_SUMS: dict[str, Any] = {"stage": 1, "extra": {"data_types": {"grad_accum_dtype": "fp32"}}}
BF16: dict[str, Any] = {"dtype": "bf16", **FP32_SUMS}  # with offload: DeepSpeed takes BF16_Optimizer without it
FP16: dict[str, Any] = {"dtype": "fp16", "offload": False, **FP32_SUMS}


def with_zero(configuration: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**configuration, "extra": {**configuration["extra"], "zero_optimization": values}}


UNAVERAGED: Table = {
    "bf16, offload": BF16,
    "bf16, offload, one micro-batch": {**BF16, "ga": 1, "overlap": False},
    "bf16, offload, eight micro-batches, small buckets": {**BF16, "ga": 8, **SMALL},
    "bf16, offload, step only at the boundary": {**BF16, "driver": "boundary"},
    "bf16, offload, engine of one driven by hand to four": {**BF16, "driver": "accelerate"},
    "bf16, offload, side branch": {**BF16, "mask": "0110"},
    "bf16, offload, all-reduce": with_zero(BF16, reduce_scatter=False),
    "fp16, offload": {**FP16, "offload": True},
    "fp16": FP16,
    "fp16, side branch": {**FP16, "mask": "0001"},
    "fp16, two parameter groups, round robin": {**FP16, "groups": 2, "round_robin": True},
    "fp16, frozen parameter, small buckets": {**FP16, "frozen": True, **SMALL},
    "fp16, clipping": {**FP16, "clip": 0.1},
    "fp16, reentrant checkpointing": {**FP16, "checkpointing": "reentrant"},
}
OVERLAP: Table = {
    "bf16, offload, overlap": {**BF16, "overlap": True},
    "bf16, offload, overlap, small buckets": {**BF16, "overlap": True, **SMALL},
    "fp16, overlap, small buckets": {**FP16, "overlap": True, **SMALL},
}
# Up to 0.16.4 this fails without trainfix.
LONE_OVERLAP: Table = {
    "bf16, offload, overlap, one micro-batch": {**BF16, "overlap": True, "ga": 1},
    "fp16, overlap, one micro-batch": {**FP16, "overlap": True, "ga": 1},
}
SKIP: Table = {"fp16 with an overflow skip": {**FP16, "loss_scale": 0, "overflow_window": 1, "windows": 4}}
HEALTHY: Table = {
    "stage 1, bf16, offload": {"stage": 1, "dtype": "bf16"},
    "stage 1, fp16": {"stage": 1, "dtype": "fp16", "offload": False},
    "stage 1, fp32": {"stage": 1, "offload": False},
    "stage 2, bf16, fp32 sums": {"dtype": "bf16", "ga": 2, "extra": FP32_SUMS["extra"]},
}
COMMUNICATED: Table = {
    "communicated, bf16": {**BF16, "scenario": "communicated", **SMALL},
    "communicated, fp16": {**FP16, "scenario": "communicated"},
}
REACHED = {**UNAVERAGED, **OVERLAP, **LONE_OVERLAP}
LAST = {**REACHED, **SKIP, **HEALTHY, **COMMUNICATED}
FIXED = {**REACHED, "untouched": {"scenario": "untouched"}}  # the last in its child: until then it is bare
EDGE = {**OVERLAP, "bf16, offload": BF16, "fp16": FP16, "fp16, small buckets": {**FP16, **SMALL}}
ONE_RANK: Table = {**UNAVERAGED, **HEALTHY, "losing": OVERLAP["bf16, offload, overlap, small buckets"]}


@pytest.fixture
def unpatched(runs):
    """0.19.7, the last affected release."""
    return runs("0.19.7", LAST, trainfix=False, ranks=2)


@pytest.fixture
def repaired(runs):
    return runs("0.19.7", LAST, trainfix=True, ranks=2)


@pytest.fixture
def fixed_upstream(runs):
    return runs("0.19.8", FIXED, trainfix=False, ranks=2, env={"TRAINFIX": "on"})


@pytest.fixture
def early(runs):
    """0.14.0, the first release that we run, without trainfix and with it."""
    return [runs("0.14.0", {**EDGE, **LONE_OVERLAP}, trainfix=on, ranks=2) for on in (False, True)]


@pytest.fixture
def alone(runs):
    """0.16.4 on one rank, without trainfix and with it."""
    return [runs("0.16.4", ONE_RANK, trainfix=on) for on in (False, True)]


def assert_unaveraged(result):
    """What the optimizer consumed is far from the ranks' mean, and from what arrived after the reduction."""
    for window in windows(result):
        assert window["relative_error"] > 0.3
        assert window["captured"]["relative_error"] > 0.3


def assert_averaged(result):
    """Every micro-batch of both ranks, to the bits that arrived, and nothing of earlier windows."""
    for window in windows(result):
        assert window["captured"]["relative_error"] < 1e-6
        assert window["relative_error"] < 1e-2
        assert window["coefficients"] == pytest.approx([1] * len(window["coefficients"]), abs=2e-2)
        assert window["earlier"] == pytest.approx([0] * len(window["earlier"]), abs=2e-2)
        assert window["global_norm_ratio"] == pytest.approx(1, abs=5e-3)
        if window["safe_norm_ratio"] is not None:
            assert window["safe_norm_ratio"] == pytest.approx(window["global_norm_ratio"], rel=1e-5)


@pytest.mark.parametrize("name", REACHED)
def test_each_of_two_ranks_on_0_19_7_trains_on_its_own_gradient(unpatched, name):
    assert_unaveraged(unpatched[name])


@pytest.mark.parametrize("name", REACHED)
def test_two_ranks_on_0_19_7_train_on_the_mean_with_trainfix(repaired, name):
    assert_averaged(repaired[name])
    assert states(repaired[name])["TF-0006"] == "applied"


@pytest.mark.parametrize("name", REACHED)
def test_with_trainfix_0_19_7_gives_the_bits_of_0_19_8(repaired, fixed_upstream, name):
    """0.19.8 keeps the bucket in fp32 and rounds what it communicates: the same bits reach the optimizer."""
    assert_averaged(fixed_upstream[name])
    assert_same_bits(repaired[name], fixed_upstream[name])


def test_a_skipped_window_leaves_nothing_behind_on_0_19_7(unpatched, repaired):
    name = "fp16 with an overflow skip"
    assert_unaveraged(unpatched[name])
    before, skipped, after, last = repaired[name]["windows"]
    assert [window["skipped"] for window in (before, skipped, after, last)] == [False, True, False, False]
    assert_averaged(repaired[name])


@pytest.mark.parametrize("name", HEALTHY)
def test_what_two_ranks_on_0_19_7_do_right_stays_the_same_bit_for_bit(unpatched, repaired, name):
    for window in windows(unpatched[name]):
        assert window["relative_error"] < 1e-2
    assert_same_bits(unpatched[name], repaired[name])


@pytest.mark.parametrize("name", COMMUNICATED)
def test_the_ranks_of_0_19_7_exchange_no_more_than_before(unpatched, repaired, name):
    assert repaired[name]["error"] is None
    assert repaired[name]["communicated"] == unpatched[name]["communicated"]
    kind = {"communicated, bf16": "torch.bfloat16", "communicated, fp16": "torch.float16"}[name]
    assert repaired[name]["communicated"][kind] > 3000  # the model has 3407 elements


@pytest.mark.parametrize("name", EDGE)
def test_two_ranks_on_0_14_0_do_the_same_and_train_on_the_mean_with_trainfix(early, name):
    before, after = (results[name] for results in early)
    assert_unaveraged(before)
    assert_averaged(after)


@pytest.mark.parametrize("name", LONE_OVERLAP)
def test_overlap_with_one_micro_batch_fails_on_0_14_0_and_runs_with_trainfix(early, name):
    before, after = (results[name] for results in early)
    assert "NoneType" in before["error"]
    assert_averaged(after)


@pytest.mark.parametrize("name", [*UNAVERAGED, *HEALTHY])
def test_one_rank_on_0_16_4_stays_the_same_bit_for_bit(alone, name):
    before, after = (results[name] for results in alone)
    for window in windows(before):
        assert window["relative_error"] < 1e-2
    assert_same_bits(before, after)


def test_one_rank_with_overlap_on_0_16_4_keeps_its_last_micro_batch_only_with_trainfix(alone):
    before, after = (results["losing"] for results in alone)
    for window in windows(before):
        assert window["coefficients"] == pytest.approx([1, 1, 1, 0.1], abs=0.15)
    for window in windows(after):
        assert window["coefficients"] == pytest.approx([1] * 4, abs=2e-2)
        assert window["relative_error"] < 1e-2
    # What hooks add to the sum, the end of the backward adds without overlap: the same bits.
    assert_same_bits(after, alone[1]["bf16, offload"])


def test_the_release_after_stays_untouched(fixed_upstream):
    result = fixed_upstream["untouched"]
    assert result["error"] is None
    assert states(result)["TF-0006"] == "fixed-upstream"
    assert "DeepSpeedZeroOptimizer.get_gradient_for_reduction" not in result["wrapped by trainfix"]
