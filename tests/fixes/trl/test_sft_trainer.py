"""TRL's own SFTTrainer, from the text to the optimizer: TF-0301, TF-0302 and TF-0303, without trainfix and with it."""

from __future__ import annotations

import shutil

import pytest

from tests.fixes.transformers.judging import assert_right, coefficients, states, windows
from tests.support import stacks
from tests.support.trl_runs import BOTH, run, stack

pytestmark = pytest.mark.slow

PLAIN = {"steps": 4}
PARTLY = {"steps": 4, "rows": 12, "epochs": 2, "lengths": [5, 0, 40, 3]}
SMOOTHED = {"steps": 4, "arguments": {"label_smoothing_factor": 0.1}}
REVERTED = {**SMOOTHED, "prepare": "tests.fixes.trl.changes:reverted"}
APPLIED = {**SMOOTHED, "prepare": "tests.fixes.trl.changes:applied"}


def own_mean(tokens, *, groups):
    """The coefficients of a mean over `groups` means: micro-batches, or ranks."""
    size = len(tokens) // groups
    sums = [sum(tokens[k * size : (k + 1) * size]) for k in range(groups)]
    return [sum(sums) / groups / sums[k // size] for k in range(len(tokens))]


@pytest.mark.parametrize(
    ("trl", "transformers"), [("0.9.3", "4.46.3"), ("0.15.2", "4.49.0"), ("0.18.2", "4.53.3")], ids=lambda it: it
)
def test_two_ranks_average_their_means_and_with_trainfix_tokens_count_the_same(trl, transformers):
    """TF-0301, through TF-0402: both ends, and the first releases that override compute_loss."""
    folders = stack(trl, transformers)
    (without,) = run(folders, [PLAIN], trainfix=False, ranks=2)
    plain, partly = run(folders, [PLAIN, PARTLY], trainfix=True, ranks=2)
    for window in windows(without):
        assert window["coefficients"] == pytest.approx(own_mean(window["tokens"], groups=2), abs=1e-3)
    assert_right(plain)
    assert_right(partly)
    assert states(plain)["TF-0301"] == "applied"


def test_the_next_release_is_right_on_two_ranks():
    """TRL 0.19.0 with the transformers of TF-0402."""
    (result,) = run(stack("0.19.0", "4.52.4"), [PLAIN], trainfix=True, ranks=2)
    assert_right(result)
    assert states(result)["TF-0301"] == "fixed-upstream"


def test_with_transformers_older_than_4_46_micro_batches_are_averaged():
    """TF-0302, through TF-0401: TRL 0.11.4, the last release that admits it."""
    folders = stack("0.11.4", "4.45.2")
    (without,) = run(folders, [PLAIN], trainfix=False)
    plain, partly = run(folders, [PLAIN, PARTLY], trainfix=True)
    for window in windows(without):
        assert window["coefficients"] == pytest.approx(own_mean(window["tokens"], groups=4), abs=1e-3)
    assert_right(plain)
    assert_right(partly)
    assert (states(plain)["TF-0301"], states(plain)["TF-0302"]) == ("not-affected", "applied")


def test_the_loss_and_the_optimizer_are_repaired_together():
    """TRL 0.11.4, transformers 4.45.2, DeepSpeed 0.16.9 with ZeRO-2 and CPU offload."""
    folders = stack("0.11.4", "4.45.2", deepspeed="0.16.9")
    (without,) = run(folders, [BOTH], trainfix=False)
    (repaired,) = run(folders, [BOTH], trainfix=True)
    means = own_mean(without["windows"][0]["tokens"], groups=8)
    assert coefficients(without)[0] == pytest.approx([means[0], 0, 0, 0, 0, 0, 0, means[-1]], abs=1e-3)
    assert_right(repaired)


@pytest.fixture(scope="module")
def smoothing():
    """TRL 1.16.0 with the last transformers whose smoother takes no count: without trainfix, and with it."""
    folders = stack("1.16.0", "5.14.1")
    without = run(folders, [SMOOTHED, PLAIN], trainfix=False)
    repaired = run(folders, [SMOOTHED, PLAIN, REVERTED, APPLIED], trainfix=True)
    return without, repaired


def test_label_smoothing_adds_up_the_means_of_micro_batches(smoothing):
    """TF-0303."""
    for window in windows(smoothing[0][0]):
        means = own_mean(window["tokens"], groups=4)
        assert window["coefficients"] == pytest.approx([4 * mean for mean in means], rel=1e-3)


def test_with_trainfix_label_smoothing_counts_tokens(smoothing):
    smoothed, plain, reverted, applied = smoothing[1]
    assert_right(smoothed)
    assert_right(plain)
    assert coefficients(reverted) == [pytest.approx(one, rel=1e-4) for one in coefficients(smoothing[0][0])]
    assert_right(applied)
    assert states(applied)["TF-0303"] == "applied"


def test_without_smoothing_the_gradient_is_the_same_bit_for_bit(smoothing):
    without, repaired = smoothing[0][1], smoothing[1][1]
    assert [one["sha256"] for one in windows(without)] == [one["sha256"] for one in windows(repaired)]


def test_on_two_ranks_the_means_are_multiplied_by_the_ranks_as_well():
    """TF-0303 on transformers 5.5.3, where TF-0404 divides the sum by the steps: both are repaired."""
    folders = stack("1.16.0", "5.5.3")
    (without,) = run(folders, [SMOOTHED], trainfix=False, ranks=2)
    smoothed, plain = run(folders, [SMOOTHED, PLAIN], trainfix=True, ranks=2)
    for window in windows(without):
        means = own_mean(window["tokens"], groups=8)
        assert window["coefficients"] == pytest.approx([2 * mean for mean in means], rel=1e-3)
    assert_right(smoothed)
    assert_right(plain)


def test_with_a_smoother_that_counts_trl_is_right_and_left_alone():
    """TRL 1.16.0 on transformers 5.15.1."""
    (result,) = run(stack("1.16.0", "5.15.1"), [SMOOTHED], trainfix=True)
    assert_right(result)
    assert states(result)["TF-0303"] == "not-affected"
    assert result["compute_loss"].endswith("trl/trainer/sft_trainer.py")


def test_trl_hands_smoothing_on_to_trainer_up_to_1_14():
    """TRL 0.24.0 on transformers 4.57.6, TF-0405."""
    (result,) = run(stack("0.24.0", "4.57.6"), [SMOOTHED], trainfix=True)
    assert_right(result)
    assert states(result)["TF-0303"] == "not-affected"
    assert result["compute_loss"].endswith("trl/trainer/sft_trainer.py")


def test_an_unknown_compute_loss_is_refused(tmp_path):
    """TRL 1.16.0 with one more factor of 1 in compute_loss, which says so and, as nobody ran it, warns."""
    changed = shutil.copytree(stacks.folder("trl", "1.16.0"), tmp_path / "trl-1.16.0")
    file = changed / "trl/trainer/sft_trainer.py"
    text = file.read_text()
    old = "steps = self.current_gradient_accumulation_steps"
    assert text.count(old) == 1
    file.write_text(text.replace(old, "steps = 1 * self.current_gradient_accumulation_steps"))
    folders = [changed, *stack("1.16.0", "5.14.1")]
    smoothed, plain = run(folders, [SMOOTHED, PLAIN], trainfix=True)
    assert states(plain)["TF-0303"] == "refused"
    assert_right(plain)
    assert smoothed["error"] is None
    assert windows(smoothed)[0]["scale"] == pytest.approx(4, abs=1e-2)
