"""TF-0201 and TF-0202: LLaMA-Factory 0.9.3 to 0.9.5 take means of means, with a processor and with ASFT.

Every training is LLaMA-Factory's own `run_exp`; see tests.support.llamafactory_runs.
"""

from __future__ import annotations

import pytest

from tests.fixes.transformers.judging import assert_right, coefficients, states, windows

pytestmark = pytest.mark.slow

CHANGES = "tests.fixes.llamafactory.changes"
ASFT = {"use_asft_loss": True, "asft_alpha": 0.1}
LORA = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj"}
SOME_EMPTY = {"lengths": [3, 0, 9, 60, 2], "rows": 10, "epochs": 2}  # the last window of an epoch has two micro-batches

PROCESSOR = {
    "pictures": {"steps": 4, "rows": 8, "checkpoint": "llava", "template": "llava", "images": True},
    "partial windows": {"steps": 4, "checkpoint": "llava", **SOME_EMPTY},
    "pretraining": {"steps": 4, "rows": 8, "checkpoint": "llava", "stage": "pt"},
    "LoRA": {"steps": 4, "rows": 8, "checkpoint": "llava", "arguments": LORA},
}
ASFT_CASES = {
    "ASFT": {"steps": 4, "rows": 8, "arguments": ASFT},
    "ASFT, partial windows": {"steps": 4, "arguments": ASFT, **SOME_EMPTY},
    "ASFT with a processor": {"steps": 4, "rows": 8, "checkpoint": "llava", "arguments": ASFT},
}
RIGHT_ANYWAY = {
    "text": {"steps": 4, "rows": 8},
    "DFT with a processor": {"steps": 4, "rows": 8, "checkpoint": "llava", "arguments": {"use_dft_loss": True}},
    "one micro-batch": {"steps": 1, "rows": 3, "checkpoint": "llava"},
}
CHANGED = {
    "reverted and applied": {"steps": 4, "rows": 20, "checkpoint": "llava", "prepare": f"{CHANGES}:revert_and_apply"}
}
OWN = {
    "own loss": {"steps": 4, "rows": 8, "checkpoint": "llava", "before": f"{CHANGES}:own_loss"},
    "given back": {"steps": 4, "rows": 4, "before": f"{CHANGES}:give_back"},
}
UNKNOWN_MODEL = {"unknown": {"steps": 4, "rows": 4, "checkpoint": "llava", "before": f"{CHANGES}:unknown_forward"}}
UNTOUCHED = {"text": {"steps": 4, "rows": 4, "prepare": f"{CHANGES}:is_untouched"}}

TABLE = PROCESSOR | ASFT_CASES | RIGHT_ANYWAY | OWN


@pytest.fixture(scope="module")
def unpatched(runs):
    """0.9.5 with transformers 5.6.0 on one rank."""
    return runs({"llamafactory": "0.9.5"}, TABLE, trainfix=False)


@pytest.fixture(scope="module")
def repaired(runs):
    """The same, `import trainfix` first."""
    return runs({"llamafactory": "0.9.5"}, TABLE | CHANGED | UNKNOWN_MODEL, trainfix=True)


def mean_of_means(tokens, times=1.0):
    """The coefficients that a window of micro-batches with these tokens gets."""
    return [times * sum(tokens) / len(tokens) / one if one else 1.0 for one in tokens]


@pytest.mark.parametrize("name", [one for one in PROCESSOR if one != "LoRA"])
def test_0_9_5_with_a_processor_takes_the_mean_of_means(unpatched, name):
    for window in windows(unpatched[name]):
        counted = [(c, n) for c, n in zip(window["coefficients"], window["tokens"], strict=True) if n]
        wanted = [c for c, n in zip(mean_of_means(window["tokens"]), window["tokens"], strict=True) if n]
        assert [c for c, _ in counted] == pytest.approx(wanted, abs=1e-2)
        assert window["relative_error"] > 0.1


@pytest.mark.parametrize("name", ["ASFT", "ASFT with a processor"])
def test_0_9_5_with_asft_takes_the_mean_of_means_times_the_steps(unpatched, name):
    first, *_ = windows(unpatched[name])
    assert first["coefficients"] == pytest.approx(mean_of_means(first["tokens"], times=4), rel=1e-2)
    assert unpatched[name]["logs"][0]["loss"] == pytest.approx(4 * first["exact_loss"], rel=0.05)


def test_0_9_5_with_asft_and_a_micro_batch_without_trained_tokens_has_no_gradient_but_nan(unpatched):
    assert "4400 of 4400 values are NaN" in unpatched["ASFT, partial windows"]["error"]


@pytest.mark.parametrize("name", [*PROCESSOR, *ASFT_CASES])
def test_0_9_5_with_trainfix_counts_every_token_the_same(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0201"] == states(repaired[name])["TF-0202"] == "applied"


def test_the_flag_of_llamafactory_stays(repaired):
    assert repaired["pictures"]["accepts_loss_kwargs"] is False


@pytest.mark.parametrize("name", RIGHT_ANYWAY)
def test_what_is_right_anyway_stays_the_same_bit_for_bit(unpatched, repaired, name):
    assert_right(unpatched[name])
    assert repaired[name]["windows"] == unpatched[name]["windows"]
    assert repaired[name]["logs"] == unpatched[name]["logs"]


def test_revert_and_apply_take_effect_at_a_later_window(repaired):
    found = coefficients(repaired["reverted and applied"])
    tokens = [window["tokens"] for window in repaired["reverted and applied"]["windows"]]
    right = [1.0] * 4
    expected = [right, right, mean_of_means(tokens[2]), right, right]  # reverted in the second, applied in the third
    for one, wanted in zip(found, expected, strict=True):
        assert one == pytest.approx(wanted, rel=1e-2)


def test_a_loss_of_the_users_own_is_left_alone(unpatched, repaired):
    assert repaired["own loss"]["windows"] == unpatched["own loss"]["windows"]
    assert repaired["own loss"]["error"] is None


def test_a_model_whose_forward_does_not_show_its_loss_is_stopped(repaired):
    assert "TF-0201 is reached and not repaired" in repaired["unknown"]["error"]
    assert "a checkpoint with a processor (LlavaForConditionalGeneration" in repaired["unknown"]["error"]
    assert "gradient_accumulation_steps = 4, 1 ranks" in repaired["unknown"]["error"]


TWO_RANKS = {
    "text": {"steps": 4, "rows": 16},
    "processor": {"steps": 4, "rows": 12, "epochs": 2, "checkpoint": "llava", "template": "llava"},
}


@pytest.mark.parametrize("version", ["0.9.3", "0.9.4", "0.9.5"])
def test_two_ranks_are_right_only_with_trainfix(runs, version):
    table = TWO_RANKS | ({"ASFT": {"steps": 4, "rows": 12, "arguments": ASFT}} if version == "0.9.5" else {})
    off, on = (runs({"llamafactory": version}, table, trainfix=trainfix, ranks=2) for trainfix in (False, True))
    first = windows(off["processor"])[0]
    assert first["coefficients"] == pytest.approx(mean_of_means(first["tokens"]), rel=1e-2)
    for name in table:
        assert_right(on[name])
    if version == "0.9.3":  # with transformers 4.52.4: TF-0203, over the ranks alone
        assert windows(off["text"])[0]["weights"] == pytest.approx([0.715] * 4 + [1.662] * 4, abs=1e-3)
        through = {one["id"]: (one["state"], one["reason"]) for one in on["text"]["status"]}
        assert through["TF-0203"] == ("applied", "through TF-0402")
    else:
        assert_right(off["text"])


def test_0_9_4_with_deepspeed_0_16_9_and_a_processor_needs_both_repairs():
    from tests.support.llamafactory_runs import four_states

    case = {"steps": 4, "rows": 8, "checkpoint": "llava", "deepspeed": {"stage": 2, "offload": True}}
    found = {state: result for state, (result,) in four_states("0.9.4", "0.16.9", [case]).items()}
    lost, means = [1, 0, 0, 1], mean_of_means(windows(found["nothing"])[0]["tokens"])
    expected = {
        "nothing": [a * b for a, b in zip(lost, means, strict=True)],
        "loss": lost,
        "optimizer": means,
        "both": [1] * 4,
    }
    for state, wanted in expected.items():
        assert windows(found[state])[0]["coefficients"] == pytest.approx(wanted, abs=1e-2), state
    assert_right(found["both"])


def test_0_9_2_does_not_turn_the_flag_off_and_is_left_alone(runs):
    found = runs({"llamafactory": "0.9.2"}, UNTOUCHED, trainfix=True)
    assert_right(found["text"])
    assert states(found["text"])["TF-0201"] == states(found["text"])["TF-0202"] == "not-affected"


def test_an_unknown_sampler_is_refused_and_a_run_that_reaches_it_is_stopped(runs):
    shuffled = "return torch.utils.data.SequentialSampler(self.train_dataset)"
    altered = {"train/sft/trainer.py": (shuffled, shuffled.replace("self", "data_source=self"))}
    table = {"processor": PROCESSOR["pictures"], "text": RIGHT_ANYWAY["text"], "ASFT": ASFT_CASES["ASFT"]}
    found = runs({"llamafactory": "0.9.5"}, table, trainfix=True, altered=altered)
    assert states(found["text"])["TF-0201"] == "refused"
    assert "TF-0201 is reached and not repaired" in found["processor"]["error"]
    assert "TF-0202 is reached and not repaired" in found["ASFT"]["error"]
    assert_right(found["text"])
