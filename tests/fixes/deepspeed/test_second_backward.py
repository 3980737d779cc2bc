"""TF-0013: several backward() before step(), the engine's accumulation at 1 and no boundary set, with CPU offload."""

from __future__ import annotations

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, states, windows

pytestmark = pytest.mark.slow

RELEASES = ["0.19.0", "0.19.8"]
SEVERAL: tables.Table = {
    "stage 1": {"stage": 1, "driver": "bare"},
    "stage 2": {"driver": "bare"},
    "stage 2, two backward()": {"driver": "bare", "ga": 2},
    "stage 2, small buckets and overlap": {"driver": "bare", "overlap": True, **tables.SMALL},
    "stage 2, side branch in 0110": {"driver": "bare", "mask": "0110"},
    "stage 2, clipping": {"driver": "bare", "clip": 0.1},
    "stage 2, fp16 with an overflow skip": {"driver": "bare", **tables.SKIP},
    "stage 2, reentrant checkpointing": {"driver": "bare", "checkpointing": "reentrant"},
}
LEFT_ALONE: tables.Table = {
    "no offload": {"driver": "bare", "offload": False},
    "one backward()": {"driver": "bare", "ga": 1},
    "boundary set by hand": {"driver": "accelerate"},
}
ALL = {**SEVERAL, **LEFT_ALONE}


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("name", SEVERAL)
def test_the_first_is_lost_and_earlier_steps_are_added_again_only_without_trainfix(runs, version, name):
    before = windows(runs(version, ALL, trainfix=False)[name])
    if "side" not in name:
        steps = len(before[0]["coefficients"])
        assert before[-1]["coefficients"] == pytest.approx([0] + [1] * (steps - 1), abs=2e-2)
    if "skip" not in name and "two backward" not in name:
        assert max(before[-1]["earlier"]) > 0.5
    after = runs(version, ALL, trainfix=True)[name]
    assert_right(after)
    assert states(after)["TF-0013"] == "applied"


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_the_rest_stays_the_same_bit_for_bit(runs, version, name):
    assert_same_bits(runs(version, ALL, trainfix=False)[name], runs(version, ALL, trainfix=True)[name])


@pytest.mark.parametrize("version", ["0.19.8"])
def test_two_ranks_keep_every_backward_only_with_trainfix(runs, version):
    table = {"stage 2": SEVERAL["stage 2"], "stage 1": SEVERAL["stage 1"]}
    for name in table:
        before = windows(runs(version, table, trainfix=False, ranks=2)[name])
        assert before[-1]["relative_error"] > 0.3
        assert_right(runs(version, table, trainfix=True, ranks=2)[name])
