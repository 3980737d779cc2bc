"""TF-0404: without DeepSpeed, transformers 5.2.0 to 5.5.3 divide a loss in Trainer and again in accelerate."""

from __future__ import annotations

import pytest

from tests.fixes.transformers.judging import assert_logged, assert_right, coefficients, states

pytestmark = pytest.mark.slow

HERE = "tests.fixes.transformers"
NOTHING_TRAINED = {"lengths": [3, 0, 9, 60, 2]}
CASES = {
    "8 steps": {"steps": 8},
    "4 steps, partial last windows": {"steps": 4, "rows": 10, "epochs": 2, **NOTHING_TRAINED},
    "clipped": {"steps": 4, "arguments": {"max_grad_norm": 1e9}},
    "num_steps by accelerator_config": {
        "steps": 1,
        "arguments": {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
    },
}
UNDIVIDED = {"one step": {"steps": 1, "rows": 3}}
OTHERS = {"another accelerator": {"steps": 4, "prepare": f"{HERE}.changes:another_accelerator"}}
CHANGED = {"reverted and applied": {"steps": 4, "rows": 24, "prepare": f"{HERE}.changes:revert_and_apply"}}
OWN_STEP = {"own step": {"steps": 4, "trainer": f"{HERE}.own_trainers:OwnStep"}}
HANDS_ON = {"a step that hands on": {"steps": 4, "trainer": f"{HERE}.own_trainers:HandsOn"}}
LATE = {"late": {"steps": 4, "prepare": f"{HERE}.changes:import_trainfix"}}
UNTOUCHED = {"untouched": {"steps": 4, "prepare": f"{HERE}.changes:is_untouched"}}
ON_DEEPSPEED = {"DeepSpeed": {"steps": 4, "deepspeed": {"stage": 2, "gradient_clipping": 0.0}}}


@pytest.fixture(scope="module")
def unpatched(runs):
    """transformers 5.5.3 on one rank."""
    return runs({"transformers": "5.5.3"}, CASES | UNDIVIDED | OTHERS | HANDS_ON | OWN_STEP, trainfix=False)


@pytest.fixture(scope="module")
def repaired(runs):
    """transformers 5.5.3 on one rank, `import trainfix` first."""
    table = CASES | UNDIVIDED | OTHERS | HANDS_ON | OWN_STEP | CHANGED
    return runs({"transformers": "5.5.3"}, table, trainfix=True)


def divisor(case):
    kwargs = case.get("arguments", {}).get("accelerator_config", {}).get("gradient_accumulation_kwargs", {})
    return kwargs.get("num_steps", case["steps"])


@pytest.mark.parametrize("name", [*CASES, *HANDS_ON])
def test_5_5_3_divides_every_micro_batch_by_the_steps_once_more(unpatched, name):
    share = 1 / divisor((CASES | HANDS_ON)[name])
    for window, shown in zip(unpatched[name]["windows"], unpatched[name]["logs"], strict=False):
        trained = [c for c, tokens in zip(window["coefficients"], window["tokens"], strict=True) if tokens]
        assert trained == pytest.approx([share] * len(trained), abs=1e-3)
        assert shown["grad_norm"] == pytest.approx(share * window["exact_norm"], rel=1e-3)
    assert_logged(unpatched[name], norm=False)  # the loss looks right


@pytest.mark.parametrize("name", [*CASES, *HANDS_ON])
def test_5_5_3_with_trainfix_divides_once(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0404"] == "applied"


def test_an_accelerator_of_the_users_own_keeps_its_steps_and_does_not_disturb_trainer(unpatched, repaired):
    for window in unpatched["another accelerator"]["windows"]:
        assert window["coefficients"] == pytest.approx([1 / 5] * 4, abs=1e-3)
    assert_right(repaired["another accelerator"])


def test_one_step_stays_the_same_bit_for_bit(unpatched, repaired):
    assert_right(unpatched["one step"])
    assert repaired["one step"]["windows"] == unpatched["one step"]["windows"]


def test_a_step_of_the_users_own_which_leaves_the_division_to_accelerate_is_left_alone(unpatched, repaired):
    assert repaired["own step"]["windows"] == unpatched["own step"]["windows"]
    for window in unpatched["own step"]["windows"]:
        assert window["scale"] == pytest.approx(1.0, abs=1e-3)


def test_revert_and_apply_take_effect_at_the_next_window(repaired):
    right, divided = [1.0] * 4, [1 / 4] * 4
    expected = [right, right, divided, divided, right, right]  # reverted in the second window, applied in the fourth
    for found, wanted in zip(coefficients(repaired["reverted and applied"]), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)


def test_two_ranks_on_5_5_3_are_right_only_with_trainfix(runs):
    table = {name: CASES[name] for name in ("4 steps, partial last windows",)}
    for trainfix in (False, True):
        (result,) = runs({"transformers": "5.5.3"}, table, trainfix=trainfix, ranks=2).values()
        if trainfix:
            assert_right(result)
        else:
            assert result["error"] is None
            assert [one["scale"] for one in result["windows"]] == pytest.approx([1 / 4] * 4, abs=1e-3)


def test_5_2_0_the_first_release_with_the_error_and_a_trainer_built_before_trainfix_came(runs):
    table = {"8 steps": CASES["8 steps"]} | LATE
    found = runs({"transformers": "5.2.0"}, table, trainfix=False, env={"TRAINFIX": "on"})
    for window in found["8 steps"]["windows"]:
        assert window["coefficients"] == pytest.approx([1 / 8] * 8, abs=1e-3)
    assert_right(found["late"])
    assert states(found["late"])["TF-0404"] == "applied"


def test_with_deepspeed_5_5_3_is_right_and_stays_the_same_bit_for_bit(runs):
    folders = {"transformers": "5.5.3", "deepspeed": "0.19.8"}
    off, on = (runs(folders, ON_DEEPSPEED, trainfix=trainfix)["DeepSpeed"] for trainfix in (False, True))
    assert_right(off)
    assert on["windows"] == off["windows"]


@pytest.mark.parametrize("version", ["5.1.0", "5.5.4"])
def test_the_releases_around_are_right_and_left_alone(runs, version):
    found = runs({"transformers": version}, UNTOUCHED, trainfix=True, env={"TRAINFIX_DISABLE": "TF-0405"})
    assert_right(found["untouched"])
    state = "fixed-upstream" if version == "5.5.4" else "not-affected"
    assert states(found["untouched"])["TF-0404"] == state


def test_an_unknown_training_step_is_refused_and_a_run_that_reaches_it_is_stopped(runs):
    altered = {
        "trainer.py": (
            "            del inputs\n            if (\n",
            "            del inputs\n            if True and (\n",
        )
    }
    table = {"8 steps": CASES["8 steps"]} | UNDIVIDED
    found = runs({"transformers": "5.5.3"}, table, trainfix=True, altered=altered)
    assert states(found["8 steps"])["TF-0404"] == "refused"
    assert "TF-0404 is reached and not repaired" in found["8 steps"]["error"]
    assert "gradient_accumulation_steps = 8, without DeepSpeed" in found["8 steps"]["error"]
    assert found["one step"]["error"] is None
