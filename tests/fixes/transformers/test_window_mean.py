"""TF-0401: up to 4.45.2 Trainer averages means. With trainfix every trained token of a window counts the same."""

from __future__ import annotations

import pytest

from tests.fixes.transformers.judging import assert_right, states, windows

pytestmark = pytest.mark.slow

HERE = "tests.fixes.transformers.window_mean_changes:"
TRAINERS = "tests.fixes.transformers.own_trainers:"
DISTINCT = [2, 9, 33, 4, 17, 61, 5, 3, 26, 12, 7, 90, 2]
SMOOTHING = {"arguments": {"label_smoothing_factor": 0.1}}

NEWEST = {"transformers": "4.45.2"}
ONE_RANK = {
    "two windows an epoch": {"steps": 4, "rows": 8, "epochs": 2},
    "windows span epochs": {"steps": 4, "rows": 7, "epochs": 3, "prepare": HERE + "leaves_nothing_behind"},
    "epochs shorter than a window": {"steps": 4, "rows": 3, "epochs": 3},
    "an epoch as long as a window": {"steps": 4, "rows": 4, "epochs": 2},
    "micro-batches of two rows": {"steps": 3, "rows": 12, "rows_per_batch": 2},
    "shuffled": {"steps": 4, "rows": 13, "epochs": 2, "shuffle": True, "lengths": DISTINCT},
    "shuffled by torch": {
        "steps": 4, "rows": 13, "epochs": 2, "shuffle": True, "lengths": DISTINCT,
        "arguments": {"accelerator_config": {"use_seedable_sampler": False}},
    },
    "workers": {"steps": 4, "rows": 8, "arguments": {"dataloader_num_workers": 2}},
    "without length": {"steps": 4, "rows": 6, "max_steps": 3, "prepare": HERE + "stream"},
    "without length, short": {"steps": 4, "rows": 3, "max_steps": 3, "prepare": HERE + "stream"},
    "own loader": {"steps": 4, "rows": 7, "epochs": 3, "trainer": HERE + "OwnLoader"},
    "resumed": {"steps": 3, "rows": 10, "epochs": 2, "lengths": DISTINCT, "prepare": HERE + "resumes"},
    "resumed at the beginning": {
        "steps": 3, "rows": 10, "epochs": 2, "lengths": DISTINCT, "prepare": HERE + "resumes",
        "arguments": {"ignore_data_skip": True},
    },
    "resumed stream": {
        "steps": 3, "rows": 10, "max_steps": 4, "lengths": DISTINCT, "prepare": HERE + "stream_resumes",
    },
    "looked at": {"steps": 4, "rows": 8, "prepare": HERE + "looked_at_by_a_callback"},
    "tokens per second": {"steps": 4, "rows": 7, "epochs": 3, "arguments": {"include_tokens_per_second": True}},
    "evaluated": {"steps": 4, "rows": 8, "prepare": HERE + "evaluates"},
    "smoothed": {"steps": 4, "rows": 7, "epochs": 2, **SMOOTHING},
    "nothing trained": {"steps": 4, "rows": 8, "lengths": [3, 0, 7, 2, 0, 0, 0, 0]},
    "nothing trained, smoothed": {"steps": 4, "rows": 8, "lengths": [3, 0, 7, 2, 0, 0, 0, 0], **SMOOTHING},
    "clipped": {"steps": 4, "rows": 8, "arguments": {"max_grad_norm": 1e9}},
    "hands on": {"steps": 4, "rows": 8, "trainer": TRAINERS + "HandsOn"},
    "own step": {"steps": 4, "rows": 8, "trainer": TRAINERS + "OwnStep"},
    "sequence to sequence": {"steps": 4, "rows": 8, "prepare": HERE + "is_seq2seq"},
    "one step": {"steps": 1, "rows": 3},
    "counts": {"steps": 4, "rows": 14, "epochs": 2, "prepare": HERE + "counts"},
}  # fmt: skip
ONLY_WITH = {
    "shifted": {"steps": 4, "rows": 4, "prepare": HERE + "knows_who_shifts"},
    "two devices": {"steps": 4, "rows": 4, "prepare": HERE + "is_refused_on_two_devices"},
    "applied too late": {"steps": 4, "rows": 8, "prepare": HERE + "applies_too_late"},
    "reverted and applied": {"steps": 4, "rows": 16, "prepare": HERE + "reverts_and_applies"},
    "reverted": {"steps": 4, "rows": 12, "prepare": HERE + "reverts_in_the_second_window"},
    "after it": {"steps": 4, "rows": 8},
}
TWO_RANKS = {
    "two windows": {"steps": 4, "rows": 16},
    "windows span epochs": {"steps": 4, "rows": 14, "epochs": 2, "prepare": HERE + "counts"},
    "epochs shorter than a window": {"steps": 4, "rows": 6, "epochs": 2},
    "one micro-batch a window": {"steps": 1, "rows": 4},
    "smoothed": {"steps": 4, "rows": 8, **SMOOTHING},
    "looked at": {"steps": 2, "rows": 8, "prepare": HERE + "looked_at_by_a_callback"},
    "stream": {
        "steps": 4, "rows": 8, "max_steps": 2, "prepare": HERE + "stream",
        "arguments": {"accelerator_config": {"dispatch_batches": False}},
    },
    "dispatched": {
        "steps": 2, "rows": 8, "rows_per_batch": 2, "max_steps": 2, "prepare": HERE + "stream",
        "arguments": {"accelerator_config": {"dispatch_batches": True, "split_batches": True}},
    },
}  # fmt: skip
DEEPSPEED = {
    f"stage {stage}": {"steps": 4, "rows": 7, "epochs": 3, "deepspeed": {"stage": stage}} for stage in (0, 1, 2)
} | {
    "offloaded": {"steps": 4, "rows": 8, "deepspeed": {"stage": 2, "offload": True}},
    "epochs shorter than a window": {"steps": 4, "rows": 3, "epochs": 4, "deepspeed": {"stage": 2}},
    "nothing trained": {"steps": 4, "rows": 4, "lengths": [3, 0, 7, 2], "deepspeed": {"stage": 1}},
}  # without offload: with it DeepSpeed 0.16.9 has TF-0001 as well
OLDEST = {"transformers": "4.41.0", "accelerate": "0.30.1"}
FEW = {name: ONE_RANK[name] for name in ("windows span epochs", "epochs shorter than a window", "resumed", "smoothed")}
WITH_DEEPSPEED = {**NEWEST, "deepspeed": "0.16.9"}
TWO_WITH_DEEPSPEED = {**NEWEST, "deepspeed": "0.15.4"}  # from 0.16.0 on it stops: ZeRO-2, and accelerate's no_sync

LEFT_ALONE = {"own step", "one step"}
# The Trainer's own count of steps, by which it logs, is not the engine's there.
COUNTED_OTHERWISE = {"epochs shorter than a window"}


def right(result):
    return [window["relative_error"] < 1e-4 for window in windows(result)]


def own_logs(name, result):
    """The result without what a resumed training found in the log of the one that it goes on with."""
    return {**result, "logs": result["logs"][1:]} if name.startswith("resumed") else result


@pytest.mark.parametrize("name", sorted(ONE_RANK.keys() - LEFT_ALONE))
def test_every_token_counts_the_same_with_4_45_2(runs, name):
    result = runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)[name]
    assert_right(own_logs(name, result))
    assert states(result)["TF-0401"] == "applied"


@pytest.mark.parametrize("name", sorted(TWO_RANKS))
def test_every_token_counts_the_same_on_two_ranks(runs, name):
    assert_right(runs(NEWEST, TWO_RANKS, trainfix=True, ranks=2)[name])


@pytest.mark.parametrize("name", sorted(FEW))
def test_every_token_counts_the_same_with_4_41_0(runs, name):
    assert_right(own_logs(name, runs(OLDEST, FEW, trainfix=True)[name]))


@pytest.mark.parametrize("name", sorted(DEEPSPEED))
def test_every_token_counts_the_same_under_deepspeed(runs, name):
    result = runs(WITH_DEEPSPEED, DEEPSPEED, trainfix=True)[name]
    assert all(right(result))
    if name not in COUNTED_OTHERWISE:
        assert_right(result, norm=False)


def test_every_token_counts_the_same_on_two_ranks_under_deepspeed(runs):
    table = {"stage 2": {**DEEPSPEED["stage 2"], "rows": 14}}
    assert_right(runs(TWO_WITH_DEEPSPEED, table, trainfix=True, ranks=2)["stage 2"], norm=False)


def test_without_trainfix_a_token_of_a_short_answer_counts_more(runs):
    first, second, *_ = windows(runs(NEWEST, ONE_RANK, trainfix=False)["two windows an epoch"])
    # 2, 3, 4 and 2 tokens, of 11 in 4 micro-batches: 11 / 4 / 2, ...
    assert first["coefficients"] == pytest.approx([1.375, 0.917, 0.688, 1.375], abs=1e-3)
    # 61, 2, 91 and 61 of 215
    assert second["coefficients"] == pytest.approx([0.881, 26.875, 0.591, 0.881], abs=1e-3)
    assert second["relative_error"] > 2
    assert first["scale"] == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(FEW))
def test_without_trainfix_4_41_0_has_the_error_too(runs, name):
    assert max(window["relative_error"] for window in windows(runs(OLDEST, FEW, trainfix=False)[name])) > 0.2


def test_without_trainfix_two_ranks_average_means_too(runs):
    found = runs(NEWEST, TWO_RANKS, trainfix=False, ranks=2)
    assert windows(found["one micro-batch a window"])[0]["coefficients"] == pytest.approx([1.25, 0.833], abs=1e-3)
    assert windows(found["two windows"])[0]["relative_error"] > 2


def test_without_trainfix_ranks_whose_epoch_is_shorter_than_a_window_drift_apart(runs):
    """The release ends such a window after its last backward, which has reduced nothing."""
    window = windows(runs(NEWEST, TWO_RANKS, trainfix=False, ranks=2)["epochs shorter than a window"])[0]
    assert window["coefficients"][3:] == pytest.approx([0, 0, 0], abs=1e-3)  # of the other rank


def test_without_trainfix_deepspeed_averages_means_as_well(runs):
    found = runs(WITH_DEEPSPEED, DEEPSPEED, trainfix=False)["stage 2"]
    assert windows(found)[0]["coefficients"] == pytest.approx([1.375, 0.917, 0.688, 1.375], abs=1e-3)


def order(result):
    """The trained tokens of every micro-batch that reached the optimizer, in their order."""
    return [count for window in windows(result) for count in window["tokens"]]


@pytest.mark.parametrize("name", sorted(ONE_RANK.keys()))
def test_the_order_of_the_data_is_that_without_trainfix(runs, name):
    without, with_it = runs(NEWEST, ONE_RANK, trainfix=False), runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)
    assert order(with_it[name]) == order(without[name])


def test_ranks_get_the_data_that_they_get_without_trainfix(runs):
    for name in ("two windows", "windows span epochs", "stream", "dispatched"):
        without, with_it = (runs(NEWEST, TWO_RANKS, trainfix=on, ranks=2)[name] for on in (False, True))
        assert order(with_it) == order(without)


@pytest.mark.parametrize("name", sorted(LEFT_ALONE))
def test_what_is_left_alone_keeps_its_bits(runs, name):
    without, with_it = runs(NEWEST, ONE_RANK, trainfix=False), runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)
    assert without[name]["windows"] == with_it[name]["windows"]
    assert without[name]["logs"] == with_it[name]["logs"]


def test_models_that_do_not_shift_their_labels_are_known(runs):
    assert runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)["shifted"]["error"] is None


def test_data_parallel_is_stopped(runs):
    assert runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)["two devices"]["error"] is None


def test_a_revert_takes_effect_at_the_next_window(runs):
    assert right(runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)["reverted"]) == [True, True, False]


def test_an_apply_takes_effect_at_the_next_window(runs):
    found = runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)["reverted and applied"]
    assert right(found) == [True, True, False, True]


def test_a_training_that_began_without_it_goes_on_without_it(runs):
    assert right(runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)["applied too late"]) == [False, False]


def test_after_a_revert_the_error_is_back(runs):
    assert right(runs(NEWEST, ONE_RANK | ONLY_WITH, trainfix=True)["after it"]) == [False, False]


def test_an_unknown_step_is_refused_where_a_run_reaches_it(runs):
    altered = {"trainer.py": ("        inputs = self._prepare_inputs(inputs)\n        if is_sagemaker_mp_enabled():\n"
                              "            loss_mb", "        inputs = self._prepare_inputs(inputs)\n        pass\n"
                              "        if is_sagemaker_mp_enabled():\n            loss_mb")}  # fmt: skip
    table = {"reached": {"steps": 4, "rows": 4}, "not reached": {"steps": 1, "rows": 4}}
    found = runs(NEWEST, table, trainfix=True, altered=altered)
    assert "TF-0401 is reached and not repaired" in found["reached"]["error"]
    assert "Trainer.training_step has an unknown body" in found["reached"]["error"]
    assert found["not reached"]["error"] is None
    assert states(found["not reached"])["TF-0401"] == "refused"


def test_4_46_1_is_left_as_it_is(runs):
    found = runs(
        {"transformers": "4.46.1"}, {"": {"steps": 1, "rows": 2, "prepare": HERE + "untouched"}}, trainfix=True
    )
    assert found[""]["error"] is None
    assert states(found[""])["TF-0401"] == "fixed-upstream"
