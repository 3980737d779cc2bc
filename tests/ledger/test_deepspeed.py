"""Real DeepSpeed releases, unrepaired: the ledger, which knows none of these errors, names what was lost or added.

The control is the same release, repaired.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.support import experiment
from tests.support.releases import release

pytestmark = pytest.mark.slow

ERRORS = {
    "TF-0001": ("0.18.9", {"ga": 8}),
    "TF-0001, bf16": ("0.18.9", {"ga": 4, "dtype": "bf16"}),
    "TF-0002": ("0.18.2", {"offload": False}),
    "TF-0003": ("0.18.9", {"driver": "accelerate"}),
    "TF-0004": ("0.18.9", {"ga": 2, "mask": "10"}),
    "TF-0005, lost": ("0.18.9", {"stage": 3, "mask": "0110"}),
    "TF-0005, repeated": ("0.19.8", {"stage": 3, "offload": False, "mask": "0111"}),
    "TF-0013": ("0.19.8", {"driver": "bare"}),
}
HEALTHY = {
    "clipping, two groups": {"groups": 2, "clip": 0.01},
    "fp16 with a loss scale": {"dtype": "fp16"},
    "stage 0": {"stage": 0, "offload": False},
    "stage 1, bf16": {"stage": 1, "offload": False, "dtype": "bf16"},
    "stage 3": {"stage": 3, "offload": False},
    "a branch that is used now and then": {"mask": "0100"},
    "checkpointing": {"checkpointing": "reentrant"},
    "a tied weight": {"tied": True},
}
_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
TWO_RANKS = {
    "stage 2, offload": {"ga": 3},
    "stage 3, bf16": {"ga": 3, "stage": 3, "dtype": "bf16"},
    "TF-0006": {"ga": 3, "stage": 1, "dtype": "bf16", "extra": _FP32_SUMS},
}


@cache
def run(version, repaired, ranks=1):
    """Name -> the windows' findings; all configurations of a release in one child."""
    asked = {name: options for name, (of, options) in ERRORS.items() if of == version} if ranks == 1 else {}
    asked |= TWO_RANKS if ranks == 2 else HEALTHY if repaired else {}
    options = {"trainfix": repaired, "ranks": ranks, "program": "tests.ledger.deepspeed_runs"}
    env = {"TRAINFIX": "on" if repaired else "off"}
    configurations = [{"ga": 4, "windows": 2, **options} for options in asked.values()]
    results = experiment.run(release(version), configurations, env=env, **options)
    assert [result["error"] for result in results] == [None] * len(results)
    return {name: result["findings"] for name, result in zip(asked, results, strict=True)}


def coefficients(found, name="coefficients"):
    return pytest.approx(found[name], abs=0.02)


def test_the_middle_micro_batches_that_0_18_9_drops_are_named():
    for found in run("0.18.9", False)["TF-0001"]:
        assert found["verdict"] == "unbalanced"
        assert coefficients(found) == [1, 0, 0, 0, 0, 0, 0, 1]
    for found in run("0.18.9", False)["TF-0001, bf16"]:
        assert coefficients(found) == [1, 0, 0, 1]


@pytest.mark.parametrize(("version", "name"), [("0.18.2", "TF-0002"), ("0.18.9", "TF-0003")])
def test_that_only_the_last_micro_batch_is_left_is_named(version, name):
    for found in run(version, False)[name]:
        assert found["verdict"] == "unbalanced"
        assert coefficients(found) == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["TF-0004", "TF-0005, lost"])
def test_the_parameters_that_lose_their_window_are_named_and_no_others(name):
    for found in run("0.18.9", False)[name]:
        assert found["verdict"] == "unbalanced"
        assert found["outliers"] == {"side.weight": 0, "side.bias": 0}


def test_what_stage_3_adds_of_the_window_before_is_named():
    first, second = run("0.19.8", False)["TF-0005, repeated"]
    assert first["verdict"] == "balanced"
    assert second["verdict"] == "unbalanced"
    assert set(second["outliers"]) == {"side.weight", "side.bias"}
    assert coefficients(second, "earlier") == [0, 1, 1, 1]


def test_a_first_backward_that_is_lost_and_a_window_that_comes_back_are_named():
    first, second = run("0.19.8", False)["TF-0013"]
    assert coefficients(first) == [0, 1, 1, 1]
    assert coefficients(second, "earlier") == [0, 1, 1, 1]


@pytest.mark.parametrize("version", ["0.18.2", "0.18.9", "0.19.8"])
def test_the_same_releases_repaired_balance_and_so_do_healthy_runs(version):
    for name, findings in run(version, True).items():
        assert len(findings) == 2, name
        for found in findings:
            assert (found["verdict"], found["outliers"], found["apart"]) == ("balanced", {}, 0), name


def test_two_ranks_repaired_balance_and_both_ranks_micro_batches_are_seen():
    for findings in run("0.18.9", True, 2).values():
        for found in findings:
            assert (found["verdict"], len(found["backwards"])) == ("balanced", 6)
            assert found["scale"] == pytest.approx(0.5, rel=0.01)


def test_ranks_that_are_never_averaged_are_named_each_with_its_own_micro_batches():
    for found in run("0.18.9", False, 2)["TF-0006"]:
        assert found["verdict"] == "unbalanced"
        own = {rank: [1, 1, 1, 0, 0, 0] if rank == "0" else [0, 0, 0, 1, 1, 1] for rank in found["of_ranks"]}
        assert set(own) == {"0", "1"}
        assert all(own[rank] == pytest.approx(found["of_ranks"][rank], abs=0.02) for rank in own)


def test_two_ranks_unrepaired_lose_the_middle_one_on_each():
    for found in run("0.18.9", False, 2)["stage 2, offload"]:
        assert coefficients(found) == [1, 0, 1, 1, 0, 1]
