"""TF-0009: sums of micro-batches in 16 bits, under ZeRO-2 with CPU offload; repaired only where it is asked for."""

from __future__ import annotations

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, states, windows

pytestmark = pytest.mark.slow

RELEASES = ["0.15.1", "0.18.9", "0.19.8"]
NARROW: tables.Table = {
    "bf16, two micro-batches": {"dtype": "bf16", "ga": 2},
    "fp16, two micro-batches": {"dtype": "fp16", "ga": 2},
    "bf16, two micro-batches, small buckets and overlap": {"dtype": "bf16", "ga": 2, "overlap": True, **tables.SMALL},
}
LONG: tables.Table = {  # on 0.18.9 these reach TF-0001 and TF-0003, whose repair sums in float32 anyway
    "bf16, eight micro-batches": {"dtype": "bf16", "ga": 8},
    "bf16, eight micro-batches, clipping": {"dtype": "bf16", "ga": 8, "clip": 0.1},
    "bf16, side branch in 0110": {"dtype": "bf16", "mask": "0110"},
}
WIDE: tables.Table = {
    "fp32, three micro-batches": {"ga": 3},
    "bf16, one micro-batch": {"dtype": "bf16", "ga": 1},
    "bf16, stage 1": {"dtype": "bf16", "stage": 1},
    "bf16, no offload": {"dtype": "bf16", "offload": False},
}
ALL = {**NARROW, **LONG, **WIDE}
ASKED = {name: {**configuration, "ask_for": ["TF-0009"]} for name, configuration in ALL.items()}

both = pytest.mark.parametrize("version", RELEASES)


def captured(result):
    return max(window["captured"]["relative_error"] for window in windows(result))


@both
@pytest.mark.parametrize("name", NARROW)
def test_sums_are_rounded_to_16_bits_until_it_is_asked_for(runs, version, name):
    before, imported = (runs(version, ALL, trainfix=trainfix)[name] for trainfix in (False, True))
    assert 1e-4 < captured(before) < 1e-2
    assert_same_bits(before, imported)
    assert states(imported)["TF-0009"] == "disabled"
    asked = runs(version, ASKED, trainfix=True)[name]
    assert_right(asked)
    assert states(asked)["TF-0009"] == "disabled"  # taken back after the run


@both
@pytest.mark.parametrize("name", LONG)
def test_long_windows_are_summed_in_float32_when_it_is_asked_for(runs, version, name):
    assert captured(runs(version, ALL, trainfix=False)[name]) > 1e-4
    assert_right(runs(version, ASKED, trainfix=True)[name])


@both
@pytest.mark.parametrize("name", WIDE)
def test_what_is_not_narrow_stays_the_same_bit_for_bit(runs, version, name):
    if version == "0.18.9" and name == "fp32, three micro-batches":
        return assert_right(runs(version, ASKED, trainfix=True)[name])  # TF-0001
    assert_same_bits(runs(version, ALL, trainfix=False)[name], runs(version, ASKED, trainfix=True)[name])
