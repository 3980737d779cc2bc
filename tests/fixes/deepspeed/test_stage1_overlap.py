"""TF-0042: parameters that the last micro-batch of a window does not use, under ZeRO-1 with overlap_comm."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, states, windows

pytestmark = pytest.mark.slow

OVERLAP: dict[str, Any] = {"stage": 1, "overlap": True}
UNUSED_LAST: tables.Table = {
    "1110": {**OVERLAP, "mask": "1110"},
    "0110, small buckets": {**OVERLAP, "mask": "0110", **tables.SMALL},
    "1000, two parameter groups, clipping": {**OVERLAP, "mask": "1000", "groups": 2, "clip": 0.1},
    "boundary set by hand": {**OVERLAP, "mask": "1110", "driver": "accelerate"},
    "two micro-batches": {**OVERLAP, "mask": "10", "ga": 2},
}
LOW_PRECISION: tables.Table = {
    "bf16": {**OVERLAP, "mask": "1110", "dtype": "bf16"},
    "fp16": {**OVERLAP, "mask": "1110", "dtype": "fp16"},
}
ALIKE: tables.Table = {
    "dense": OVERLAP,
    "dense, bf16, small buckets": {**OVERLAP, "dtype": "bf16", **tables.SMALL},
    "dense, no offload": {**OVERLAP, "offload": False},
    "0111, no offload": {**OVERLAP, "offload": False, "mask": "0111"},
    "no overlap": {"stage": 1, "mask": "1110"},
}
ALL = {**UNUSED_LAST, **LOW_PRECISION, **ALIKE}
TWO_RANKS = {
    f"{name}, {where}": {**configuration, "offload": where == "offload"}
    for where in ("offload", "device")
    for name, configuration in {**UNUSED_LAST, "bf16": LOW_PRECISION["bf16"]}.items()
}
RELEASES = ["0.14.4", "0.18.9", "0.19.8"]
releases = pytest.mark.parametrize("version", RELEASES)


@releases
@pytest.mark.parametrize("name", UNUSED_LAST)
def test_the_sum_of_the_window_is_lost_only_without_trainfix(runs, version, name):
    for window in windows(runs(version, ALL, trainfix=False)[name]):
        assert window["side"]["relative_error"] == pytest.approx(1, abs=1e-3)
    after = runs(version, ALL, trainfix=True)[name]
    assert_right(after)
    assert states(after)["TF-0042"] == "applied"


@releases
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_the_same_in_16_bits(runs, version, name):
    for window in windows(runs(version, ALL, trainfix=False)[name]):
        assert window["side"]["relative_error"] > 0.9
    for window in windows(runs(version, ALL, trainfix=True)[name]):
        assert window["side"]["relative_error"] < 2e-2


@releases
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_right_stays_the_same_bit_for_bit(runs, version, name):
    assert_same_bits(runs(version, ALL, trainfix=False)[name], runs(version, ALL, trainfix=True)[name])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_lose_it_or_do_not_average_it_only_without_trainfix(runs, name):
    for window in windows(runs("0.19.8", TWO_RANKS, trainfix=False, ranks=2)[name]):
        assert window["side"]["relative_error"] > 0.5
    for window in windows(runs("0.19.8", TWO_RANKS, trainfix=True, ranks=2)[name]):
        assert window["side"]["relative_error"] < (2e-2 if "bf16" in name else 1e-5)


def test_a_rank_that_did_not_use_it_takes_part_with_zeros(runs):
    table = {
        name: {**OVERLAP, "scenario": "used_on_one_rank", "offload": name == "offload", "mask": "1110"}
        for name in ("offload", "device")
    }
    for result in runs("0.19.8", table, trainfix=True, ranks=2).values():
        for window in windows(result):
            assert window["relative_error"] < 1e-5
