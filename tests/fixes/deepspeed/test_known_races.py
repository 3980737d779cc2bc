"""TF-0010, TF-0011, TF-0012: a run that reaches them is warned once, is never stopped, and nothing is replaced."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import states

pytestmark = pytest.mark.slow

STREAMS: dict[str, Any] = {"scenario": "on_streams", "offload": False}
REACHED = {
    "TF-0011": {**STREAMS, "stage": 3},
    "TF-0012": {**STREAMS, "stage": 1, "overlap": True, **tables.SMALL},
}
SPARED = {
    "a device without streams": {"stage": 1, "offload": False, "overlap": True, **tables.SMALL},
    "no overlap": {**STREAMS, "stage": 1, "overlap": False, **tables.SMALL},
    "large buckets": {**STREAMS, "stage": 1, "overlap": True},
}
EXPERTS = {
    "shared out": {"scenario": "experts", "shared_out": True, "offload": False},
    "not shared out": {"scenario": "experts", "shared_out": False, "offload": False},
}


@pytest.mark.parametrize("id", REACHED)
def test_a_run_that_reaches_it_on_0_18_7_is_warned_once_and_trains(runs, id):
    result = runs("0.18.7", {**REACHED, **SPARED}, trainfix=True)[id]
    assert result["error"] is None
    assert len(result["windows"]) == 3
    assert [text[:7] for text in result["warned"]] == [id]
    assert "refused: trainfix knows it and does not repair it" in result["warned"][0]
    assert states(result)[id] == "refused"


@pytest.mark.parametrize("name", SPARED)
def test_a_run_that_does_not_reach_it_hears_nothing(runs, name):
    result = runs("0.18.7", {**REACHED, **SPARED}, trainfix=True)[name]
    assert result["error"] is None
    assert result.get("warned", []) == []


def test_while_the_bucket_index_was_reset_any_second_bucket_is_one_too_many(runs):
    small = {"stage": 1, "overlap": True, "bucket": 2000}  # no parameter is larger, the model is
    table = {"small buckets": {**STREAMS, **small}}
    assert len(runs("0.17.3", table, trainfix=True)["small buckets"]["warned"]) == 1
    assert runs("0.18.7", table, trainfix=True)["small buckets"]["warned"] == []


def test_0_19_8_has_none_of_them(runs):
    for result in runs("0.19.8", REACHED, trainfix=True).values():
        assert result["warned"] == []
        assert {states(result)[id] for id in ("TF-0010", "TF-0011", "TF-0012")} == {"fixed-upstream"}


def test_experts_that_are_shared_out_over_the_ranks_are_warned_of_on_0_15_3(runs):
    found = runs("0.15.3", EXPERTS, trainfix=True, ranks=2)
    assert [result["error"] for result in found.values()] == [None, None]
    assert [text[:7] for text in found["shared out"]["warned"]] == ["TF-0010"]
    assert "experts whose data-parallel group has 1 of 2 ranks" in found["shared out"]["warned"][0]
    assert found["not shared out"]["warned"] == []
