"""TF-0501: up to 1.7.0, under DeepSpeed, an incomplete window goes into the next epoch. With trainfix it ends."""

from __future__ import annotations

import functools

import pytest

from tests.support import accelerate_runs, trainer_runs
from tests.support.stacks import stack

pytestmark = pytest.mark.slow

# Six micro-batches an epoch, windows of four. All rows have as many tokens, so a mean of means is the mean of tokens.
LOOP = {"steps": 4, "rows": 6, "epochs": 2}
TABLE = {f"stage {stage}": {**LOOP, "deepspeed": {"stage": stage}} for stage in (0, 1, 2)} | {
    "offloaded": {**LOOP, "deepspeed": {"stage": 2, "offload": True}},
    "whole windows": {**LOOP, "rows": 8},
    "left to DeepSpeed": {**LOOP, "arguments": {"accumulate": False}},
}
REVERTED = {
    "reverted in an incomplete window": {**LOOP, "epochs": 3, "arguments": {"revert_at": 5}},
    "applied in an incomplete window": {**LOOP, "epochs": 3, "arguments": {"apply_at": 5}},
    "back": {**LOOP, "arguments": {"revert_at": 0}},
}
NEWEST = {"transformers": "4.49.0", "accelerate": "1.7.0", "deepspeed": "0.16.9"}
OLDEST = {"transformers": "4.45.2", "accelerate": "0.29.3", "deepspeed": "0.15.4"}
TRAINER = {"transformers": "4.53.3", "accelerate": "1.7.0", "deepspeed": "0.16.9"}
TWO_RANKS = {**NEWEST, "deepspeed": "0.15.4"}  # from 0.16.0 on `accumulate` stops there: ZeRO-2 has no `no_sync`
INCOMPLETE = ("stage 0", "stage 1", "stage 2", "offloaded")


@functools.cache
def _found(packages, names, *, trainfix, ranks=1):
    table = {**TABLE, **REVERTED}
    rows = [{**table[name], "rows": table[name]["rows"] * ranks} for name in names]
    results = accelerate_runs.run(stack(**dict(packages)), rows, trainfix=trainfix, ranks=ranks)
    return dict(zip(names, results, strict=True))


def loops(packages, table, **options):
    return _found(tuple(packages.items()), tuple(table), **options)


def coefficients(result):
    assert result["error"] is None, result["error"]
    return [window["coefficients"] for window in result["windows"]]


@pytest.mark.parametrize("name", INCOMPLETE)
def test_without_trainfix_an_epochs_rest_goes_into_the_next_epoch(name):
    result = loops(NEWEST, TABLE, trainfix=False)[name]
    assert result["error"] is None
    assert result["ends"] == [4, 6, 10, 12]  # so accelerate says
    assert result["steps"] == [4, 8, 12]


@pytest.mark.parametrize("name", INCOMPLETE)
def test_every_window_ends_where_accelerate_says(name):
    result = loops(NEWEST, {**TABLE, **REVERTED}, trainfix=True)[name]
    assert result["steps"] == result["ends"] == [4, 6, 10, 12]
    # The engine divides by 4 all the same, as accelerate does without DeepSpeed.
    wanted = [[1.0] * 4, [0.5] * 2] * 2
    for found, window in zip(coefficients(result), wanted, strict=True):
        assert found == pytest.approx(window, abs=1e-5)


def test_0_29_3_has_the_error_and_the_repair():
    some = {"stage 2": TABLE["stage 2"]}
    assert loops(OLDEST, some, trainfix=False)["stage 2"]["steps"] == [4, 8, 12]
    assert loops(OLDEST, some, trainfix=True)["stage 2"]["steps"] == [4, 6, 10, 12]


def test_two_ranks_end_their_windows_together():
    some = {"stage 2": TABLE["stage 2"]}
    assert loops(TWO_RANKS, some, trainfix=False, ranks=2)["stage 2"]["steps"] == [4, 8, 12]
    result = loops(TWO_RANKS, some, trainfix=True, ranks=2)["stage 2"]
    assert result["steps"] == [4, 6, 10, 12]
    assert coefficients(result)[1] == pytest.approx([0.5] * 4, abs=1e-5)


@pytest.mark.parametrize("name", ["whole windows", "left to DeepSpeed"])
def test_a_loop_without_incomplete_windows_keeps_its_bits(name):
    without = loops(NEWEST, TABLE, trainfix=False)[name]
    with_it = loops(NEWEST, {**TABLE, **REVERTED}, trainfix=True)[name]
    assert with_it["windows"] == without["windows"]
    assert with_it["steps"] == without["steps"] == list(range(4, len(without["windows"]) * 4 + 1, 4))


def test_a_reverted_repair_ends_the_window_under_way():
    result = loops(NEWEST, {**TABLE, **REVERTED}, trainfix=True)["reverted in an incomplete window"]
    assert result["ends"] == [4, 6, 10, 12, 16, 18]
    assert result["steps"] == [4, 6, 10, 14, 18]
    assert not result["kept"]


def test_a_window_that_began_without_it_ends_as_it_began():
    result = loops(NEWEST, {**TABLE, **REVERTED}, trainfix=True)["applied in an incomplete window"]
    assert result["steps"][-3:] == [12, 16, 18]
    assert coefficients(result)[-1] == pytest.approx([0.5] * 2, abs=1e-5)


def test_after_a_revert_the_error_is_back():
    assert loops(NEWEST, {**TABLE, **REVERTED}, trainfix=True)["back"]["steps"] == [4, 8, 12]


@pytest.mark.parametrize("version", ["1.8.0", "1.15.0"])
def test_1_8_0_and_newer_are_left_as_they_are(version):
    packages = {**NEWEST, "accelerate": version}
    result = loops(packages, {"stage 2": TABLE["stage 2"]}, trainfix=True)["stage 2"]
    assert result["steps"] == [4, 6, 10, 12]
    assert {one["state"] for one in result["status"] if one["id"] == "TF-0501"} == {"fixed-upstream"}


@functools.cache
def trained(*, trainfix, ranks):
    row = {"steps": 4, "rows": 6 * ranks, "epochs": 2, "deepspeed": {"stage": 2}}
    (result,) = trainer_runs.run(stack(**TRAINER), [row], trainfix=trainfix, ranks=ranks)
    assert result["error"] is None, result["error"]
    return result


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_trainfix_trainers_next_epoch_begins_in_the_middle_of_a_window(ranks):
    result = trained(trainfix=False, ranks=ranks)
    assert len(result["windows"]) == 3
    assert result["windows"][1]["relative_error"] > 0.5


@pytest.mark.parametrize("ranks", [1, 2])
def test_trainers_windows_are_right(ranks):
    result = trained(trainfix=True, ranks=ranks)
    assert [len(window["tokens"]) for window in result["windows"]] == [4 * ranks, 2 * ranks] * 2
    assert max(window["relative_error"] for window in result["windows"]) < 1e-4
    logged = [one["loss"] for one in result["logs"] if "loss" in one]
    assert logged == pytest.approx([window["exact_loss"] for window in result["windows"]], abs=2e-4)
