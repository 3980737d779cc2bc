"""Where every advisory is disabled, trainfix leaves every function as it is."""

from __future__ import annotations

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import states
from trainfix.settings import ADVISORY_IDS

pytestmark = pytest.mark.slow

RELEASES = ["0.18.9", "0.19.8"]
NONE = {"TRAINFIX_DISABLE": ",".join(ADVISORY_IDS)}
UNTOUCHED = {"untouched": {"scenario": "untouched"}}


@pytest.mark.parametrize("version", RELEASES)
def test_the_very_same_functions_stay_in_place_when_trainfix_comes_after(runs, version):
    result = runs(version, tables.HEALTHY_RELEASE, trainfix=False, env={"TRAINFIX": "on", **NONE})["untouched"]
    assert result["error"] is None
    assert result["functions"] > 200
    assert result["changed"] == []
    assert "applied" not in states(result).values()


@pytest.mark.parametrize("version", RELEASES)
def test_every_function_is_the_releases_own_when_trainfix_comes_first(runs, version):
    result = runs(version, UNTOUCHED, trainfix=True, env=NONE)["untouched"]
    assert result["error"] is None
    assert result["functions"] > 200
    assert result["wrapped by trainfix"] == []
    assert "applied" not in states(result).values()


def test_the_same_check_finds_the_repair_on_0_18_9(runs):
    result = runs("0.18.9", UNTOUCHED, trainfix=True)["untouched"]
    names = ("copy_grads_in_partition", "reduce_ipg_grads", "__init__")
    assert {f"DeepSpeedZeroOptimizer.{name}" for name in names} <= set(result["wrapped by trainfix"])
