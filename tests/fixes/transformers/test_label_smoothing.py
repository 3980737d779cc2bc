"""TF-0405: label smoothing in transformers 4.46 to 5.14, where the smoother returns a mean and nobody divides it."""

from __future__ import annotations

import pytest

from tests.fixes.transformers.judging import assert_logged, assert_right, coefficients, states, windows

pytestmark = pytest.mark.slow

HERE = "tests.fixes.transformers"
SMOOTHED = {"arguments": {"label_smoothing_factor": 0.1}}
SHORT = {"steps": 4, "rows": 10, "lengths": [3, 0, 9, 60, 2], **SMOOTHED}  # also a micro-batch that trains nothing
OVER_RANKS = {"steps": 4, "arguments": {**SMOOTHED["arguments"], "average_tokens_across_devices": True}}
CASES = {
    "8 steps": {"steps": 8, **SMOOTHED},
    "4 steps, partial last windows": {"epochs": 2, **SHORT},
    "two rows in a micro-batch": {"steps": 4, "rows_per_batch": 2, **SMOOTHED},
    "a window without trained tokens": {"steps": 2, "rows": 4, "lengths": [0, 0, 2, 7], **SMOOTHED},
    "half smoothed": {"steps": 4, "arguments": {"label_smoothing_factor": 0.5}},
}
RIGHT_ANYWAY = {
    "one step": {"steps": 1, "rows": 3, **SMOOTHED},
    "not smoothed": {"steps": 4},
}
OWN = {
    "a smoother of the user's own": {"steps": 4, "trainer": f"{HERE}.own_trainers:OwnSmoother", **SMOOTHED},
    "the smoother in a loss of the user's own": {"steps": 4, "trainer": f"{HERE}.own_trainers:OwnUse", **SMOOTHED},
}
HANDS_ON = {"a step that hands on": {"steps": 4, "trainer": f"{HERE}.own_trainers:HandsOn", **SMOOTHED}}
CHANGED = {"changed": {"steps": 4, "rows": 24, "prepare": f"{HERE}.changes:revert_and_apply", **SMOOTHED}}
LATE = {"late": {"steps": 4, "prepare": f"{HERE}.changes:import_trainfix", **SMOOTHED}}
UNTOUCHED = {"untouched": {"steps": 4, "prepare": f"{HERE}.changes:is_untouched", **SMOOTHED}}
ON_DEEPSPEED = {"DeepSpeed": {"steps": 4, "deepspeed": {"stage": 1, "gradient_clipping": 0.0}, **SMOOTHED}}


@pytest.fixture(scope="module")
def unpatched(runs):
    """transformers 5.14.1, the last release with the error, on one rank."""
    return runs({"transformers": "5.14.1"}, CASES | RIGHT_ANYWAY | OWN | HANDS_ON, trainfix=False)


@pytest.fixture(scope="module")
def repaired(runs):
    """transformers 5.14.1 on one rank, `import trainfix` first."""
    return runs({"transformers": "5.14.1"}, CASES | RIGHT_ANYWAY | OWN | HANDS_ON | CHANGED, trainfix=True)


def assert_mean_of_means(result, *, times):
    """Each micro-batch with trained tokens has the same part of the loss, `times` as large as its part of the mean."""
    for window in windows(result):
        counts = window["tokens"]
        trained = [(c, n) for c, n in zip(window["coefficients"], counts, strict=True) if n]
        expected = [times * sum(counts) / (len(counts) * n) for _, n in trained]
        assert [c for c, _ in trained] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["8 steps", "two rows in a micro-batch", "half smoothed"])
def test_5_14_1_adds_up_the_means_of_the_micro_batches(unpatched, name):
    steps = CASES[name]["steps"]
    assert_mean_of_means(unpatched[name], times=steps)
    exact, shown = unpatched[name]["windows"][0]["exact_loss"], unpatched[name]["logs"][0]["loss"]
    assert shown == pytest.approx(steps * exact, rel=0.05)


@pytest.mark.parametrize("name", [*CASES, *HANDS_ON])
def test_5_14_1_with_trainfix_counts_every_token_the_same(repaired, name):
    if name != "a window without trained tokens":
        assert_right(repaired[name])
    assert states(repaired[name])["TF-0405"] == "applied"


def test_a_window_without_trained_tokens_gives_zero_and_the_next_one_is_right(repaired):
    nothing, something = windows(repaired["a window without trained tokens"])
    assert nothing["tokens"] == [0, 0]
    assert nothing["relative_error"] == 0
    assert nothing["exact_norm"] == 0
    assert something["weights"] == pytest.approx([1, 1], abs=1e-3)
    assert something["scale"] == pytest.approx(1, abs=1e-3)
    assert_logged(repaired["a window without trained tokens"])


@pytest.mark.parametrize("name", RIGHT_ANYWAY)
def test_what_is_right_on_5_14_1_keeps_its_bits(unpatched, repaired, name):
    assert_right(unpatched[name])
    assert gradients(repaired[name]) == gradients(unpatched[name])


@pytest.mark.parametrize("name", OWN)
def test_what_a_user_smooths_keeps_its_bits(unpatched, repaired, name):
    assert_mean_of_means(unpatched[name], times=1)
    assert gradients(repaired[name]) == gradients(unpatched[name])


def gradients(result):
    return [(window["coefficients"], window["relative_error"], window["cosine"]) for window in windows(result)]


def test_revert_and_apply_take_effect_at_the_next_window(repaired):
    found = [max(window) for window in coefficients(repaired["changed"])]
    right = [value == pytest.approx(1.0, abs=1e-3) for value in found]
    assert right == [True, True, False, False, True, True]  # reverted in the second window, applied in the fourth


@pytest.mark.parametrize("version", ["4.46.3", "4.57.6", "5.5.3"])
def test_one_rank_is_right_only_with_trainfix(runs, version):
    table = {"partial": SHORT, "late": LATE["late"]}
    found = runs({"transformers": version}, table, trainfix=False, env={"TRAINFIX": "on"})
    divided = 4 if version.startswith(("5.2.", "5.5.3")) else 1  # TF-0404
    assert_mean_of_means({**found["partial"], "windows": found["partial"]["windows"][:1]}, times=4 / divided)
    assert_right(found["late"])
    assert states(found["late"])["TF-0405"] == "applied"


@pytest.mark.parametrize("version", ["4.46.1", "4.53.3", "5.14.1"])
def test_two_ranks_are_right_only_with_trainfix(runs, version):
    table = {"partial": SHORT} | ({} if version == "4.46.1" else {"over ranks": OVER_RANKS})
    off, on = (runs({"transformers": version}, table, trainfix=trainfix, ranks=2) for trainfix in (False, True))
    over_ranks = version == "5.14.1"  # there by default
    assert_mean_of_means({**off["partial"], "windows": off["partial"]["windows"][:1]}, times=4 * (1 + over_ranks))
    for name in table:
        assert_right(on[name])
    if "over ranks" in table:
        assert_mean_of_means(off["over ranks"], times=8)


@pytest.mark.parametrize("version", ["4.47.0", "4.48.0"])
def test_the_releases_that_lose_the_count_are_right_with_the_repair_of_tf_0407(runs, version):
    (result,) = runs({"transformers": version}, {"8 steps": CASES["8 steps"]}, trainfix=True).values()
    assert states(result)["TF-0407"] == "applied"
    assert_right(result)


@pytest.mark.parametrize(["version", "deepspeed"], [("4.48.3", "0.16.9"), ("5.5.3", "0.19.8")])
def test_with_deepspeed_it_is_right_only_with_trainfix(runs, version, deepspeed):
    folders = {"transformers": version, "deepspeed": deepspeed}
    off, on = (runs(folders, ON_DEEPSPEED, trainfix=trainfix)["DeepSpeed"] for trainfix in (False, True))
    assert_mean_of_means(off, times=4 if version == "5.5.3" else 1)  # the engine of the others divides (TF-0403)
    assert_right(on, norm=False)


@pytest.mark.parametrize("name", ["classifier", "masked"])
def test_other_models_whose_labels_are_smoothed_get_what_5_15_0_gives_them(runs, name):
    table = {one: {"case": one, "arguments": {"label_smoothing_factor": 0.1}} for one in ("classifier", "masked")}
    program = "tests.fixes.transformers.own_losses"
    off, on = (runs({"transformers": "5.14.1"}, table, trainfix=on, program=program)[name] for on in (False, True))
    fixed = runs({"transformers": "5.15.0"}, table, trainfix=False, program=program)[name]
    assert [off["error"], on["error"], fixed["error"]] == [None] * 3
    assert on["losses"] == pytest.approx(fixed["losses"], rel=1e-4)
    assert on["norms"] == pytest.approx(fixed["norms"], rel=1e-3)
    assert off["losses"][0] == pytest.approx(4 * fixed["losses"][0], rel=0.2)


@pytest.mark.parametrize("version", ["4.45.2", "5.15.0"])
def test_the_releases_around_are_left_alone(runs, version):
    env = {"TRAINFIX_DISABLE": "TF-0401"}
    (result,) = runs({"transformers": version}, UNTOUCHED, trainfix=True, env=env).values()
    if version == "5.15.0":
        assert_right(result)
    else:
        assert_mean_of_means(result, times=1)
    assert states(result)["TF-0405"] == ("fixed-upstream" if version == "5.15.0" else "not-affected")


def test_an_unknown_label_smoother_is_refused_and_a_run_that_reaches_it_is_stopped(runs):
    altered = {"trainer_pt_utils.py": ("padding_mask = labels.eq(", "padding_mask = labels.clone().eq(")}
    table = {"8 steps": CASES["8 steps"]} | RIGHT_ANYWAY
    found = runs({"transformers": "5.14.1"}, table, trainfix=True, altered=altered)
    assert states(found["8 steps"])["TF-0405"] == "refused"
    assert "TF-0405 is reached and not repaired" in found["8 steps"]["error"]
    assert "label_smoothing_factor = 0.1, gradient_accumulation_steps = 8" in found["8 steps"]["error"]
    for name in RIGHT_ANYWAY:
        assert found[name]["error"] is None
