"""A user's own loss keeps its bits, whatever trainfix repairs in that release; and trainfix says so once."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

RELEASES = ("4.45.2", "4.46.3", "4.53.3", "4.57.6", "5.5.3")
SMOOTHING = {"label_smoothing_factor": 0.1}  # what TF-0405 is about; the user's own loss does not look at it
CASES = {
    "overridden": {"case": "overridden", "arguments": SMOOTHING},
    "function": {"case": "function", "arguments": SMOOTHING},
    "classifier": {"case": "classifier"},
    "masked": {"case": "masked"},
}
WHOSE = {
    "overridden": "(own loss: tests.fixes.transformers.own_losses.compute_loss)",
    "function": "(own loss: compute_loss_func tests.fixes.transformers.own_losses.weighted)",
    "classifier": "(not a causal language model: LlamaForSequenceClassification)",
    "masked": "(not a causal language model: BertForMaskedLM)",
}
# TF-0404 is wrong for every loss: 5.5.3 divides these twice as well, and there they are repaired.
DIVIDED_TWICE = {"5.5.3"}
WITHOUT_FUNCTION = {"4.45.2"}  # which has no compute_loss_func
WEIGHS_MODELS = {"4.45.2": ["TF-0401"], "4.46.3": ["TF-0402"], "4.53.3": ["TF-0402", "TF-0406"]}
SMOOTHS = {"4.46.3", "4.53.3", "4.57.6", "5.5.3"}

THERE = [(v, c) for v in RELEASES for c in CASES if c != "function" or v not in WITHOUT_FUNCTION]
every_case = pytest.mark.parametrize(["version", "case"], THERE)


@pytest.fixture
def trained(runs):
    """A function: release, whether trainfix is on -> the results by case."""

    def results(version, *, trainfix):
        cases = {name: CASES[name] for release, name in THERE if release == version}
        if version in DIVIDED_TWICE:  # the second window is to meet the same weights, whatever the first one's size
            cases = {
                name: {**one, "arguments": {**one.get("arguments", {}), "learning_rate": 0.0}}
                for name, one in cases.items()
            }
        program = "tests.fixes.transformers.own_losses"
        return runs({"transformers": version}, cases, trainfix=trainfix, program=program)

    return results


@every_case
def test_the_gradients_and_the_log_of_an_own_loss_are_the_same_bits_with_trainfix(trained, version, case):
    without, with_it = (trained(version, trainfix=trainfix)[case] for trainfix in (False, True))
    assert [without["error"], with_it["error"]] == [None, None]
    assert len(without["bits"]) == 2
    assert with_it["bits"] == without["bits times steps" if version in DIVIDED_TWICE else "bits"]
    assert with_it["losses"] == without["losses"]


def said(result, id, whose):
    return [text for text in result["said"] if id in text and f"not-affected {whose}" in text]


@pytest.mark.parametrize(["version", "case"], [(v, c) for v, c in THERE if v in WEIGHS_MODELS])
def test_that_the_token_weights_of_an_own_loss_are_left_alone_is_said_once(trained, version, case):
    result = trained(version, trainfix=True)[case]
    for id in WEIGHS_MODELS[version]:
        assert len(said(result, id, WHOSE[case])) == 1, result["said"]


@pytest.mark.parametrize("case", ["overridden", "function"])
@pytest.mark.parametrize("version", sorted(SMOOTHS))
def test_that_an_own_loss_is_not_smoothed_anew_is_said_once(trained, version, case):
    result = trained(version, trainfix=True)[case]
    assert result["smoother"]
    assert len(said(result, "TF-0405", WHOSE[case])) == 1, result["said"]


@pytest.mark.parametrize("case", CASES)
def test_trainfix_says_nothing_of_whose_loss_it_is_where_nothing_looks_at_it(trained, case):
    result = trained("5.5.3", trainfix=True)[case]
    assert not said(result, "TF-0404", "")
    if "arguments" not in CASES[case]:
        assert not any("not-affected" in text for text in result["said"])
