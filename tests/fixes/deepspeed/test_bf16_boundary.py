"""TF-0007: what BF16_Optimizer gives torch's optimizer on two ranks, without trainfix and with it.

The ranks reduce in float32 (`communication_data_type`), so that a right sum is right to the last bits. The engine's
all-reduce of these gradients works on the CPU accelerator in every release.
"""

from __future__ import annotations

import shutil

import pytest

from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, assert_window_right, states, windows
from tests.support import experiment
from tests.support.releases import release

pytestmark = pytest.mark.slow

TYPES = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
BASE = {"stage": 1, "offload": False, "dtype": "bf16", "extra": TYPES}
LOSING = {
    **{f"{steps} steps": {**BASE, "ga": steps} for steps in (1, 3, 4, 8)},
    "boundary by hand": {**BASE, "driver": "boundary"},
    "an engine of one step": {**BASE, "driver": "accelerate"},
    "loss.backward()": {**BASE, "backward": "torch"},
    "scale_wrt_gas=False": {**BASE, "backward": "unscaled"},
    "reentrant checkpointing": {**BASE, "checkpointing": "reentrant"},
    "checkpointing": {**BASE, "checkpointing": "nonreentrant"},
    "a branch used in some micro-batches": {**BASE, "mask": "0110"},
    "a branch unused in the last": {**BASE, "mask": "1110"},
    "two groups, one frozen": {**BASE, "groups": 2, "frozen": True},
    "clipping": {**BASE, "clip": 0.1},
}
RIGHT = {
    "immediate_grad_update": {**BASE, "extra": {**TYPES, "bf16": {"immediate_grad_update": True}}},
    "immediate_grad_update, 1 step": {**BASE, "ga": 1, "extra": {**TYPES, "bf16": {"immediate_grad_update": True}}},
    "accumulation in bf16": {**BASE, "extra": {"communication_data_type": "fp32"}},
}
BOTH = LOSING | RIGHT
WITH_TRAINFIX = {
    "revert": {**BASE, "scenario": "revert", "windows": 5},
    "resume": {**BASE, "scenario": "resume"},
}
UNTOUCHED = {"untouched": {"scenario": "untouched"}}
ENDS = {name: LOSING[name] for name in ("1 steps", "4 steps")}
ONE_RANK = {name: LOSING[name] for name in ("1 steps", "4 steps", "loss.backward()")}


@pytest.fixture(scope="module")
def unpatched(runs):
    """DeepSpeed 0.18.9 on two ranks."""
    return runs("0.18.9", BOTH, trainfix=False, ranks=2)


@pytest.fixture(scope="module")
def repaired(runs):
    """DeepSpeed 0.18.9 on two ranks, `import trainfix` first."""
    return runs("0.18.9", BOTH | WITH_TRAINFIX, trainfix=True, ranks=2)


@pytest.fixture(scope="module")
def next_release(runs):
    """DeepSpeed 0.19.0 on two ranks, `import trainfix` first, which leaves it alone."""
    return runs("0.19.0", LOSING | UNTOUCHED, trainfix=True, ranks=2)


def assert_not_averaged(result):
    for window in windows(result):
        assert window["captured"]["relative_error"] > 0.1


@pytest.mark.parametrize("name", LOSING)
def test_0_18_9_does_not_average_the_boundary_micro_batch(unpatched, name):
    assert_not_averaged(unpatched[name])


def test_0_18_9_averages_nothing_where_every_micro_batch_is_a_boundary(unpatched):
    """With one step each rank's part is its own gradient, far from the mean of two."""
    for window in windows(unpatched["1 steps"]):
        assert window["captured"]["relative_error"] > 0.7


@pytest.mark.parametrize("name", LOSING)
def test_0_18_9_averages_every_micro_batch_with_trainfix(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0007"] == "applied"


@pytest.mark.parametrize("name", LOSING)
def test_0_18_9_with_trainfix_gives_the_bits_of_0_19_0(repaired, next_release, name):
    assert_right(next_release[name])
    assert_same_bits(repaired[name], next_release[name])


def test_clipping_acts_on_the_whole_sum(repaired):
    for window in windows(repaired["clipping"]):
        assert window["consumed_norm"] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", RIGHT)
def test_what_0_18_9_averages_stays_the_same_bit_for_bit(unpatched, repaired, name):
    for window in windows(unpatched[name]):
        assert window["captured"]["relative_error"] < 1e-6
    assert_same_bits(unpatched[name], repaired[name])


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_on_0_18_9_stays_the_same_bit_for_bit(runs, name):
    unpatched = runs("0.18.9", ONE_RANK, trainfix=False)[name]
    assert_right(unpatched)
    assert_same_bits(unpatched, runs("0.18.9", ONE_RANK, trainfix=True)[name])


@pytest.mark.parametrize("name", ENDS)
def test_0_18_5_is_the_first_release_that_shows_it(runs, name):
    assert_not_averaged(runs("0.18.5", ENDS, trainfix=False, ranks=2)[name])
    assert_right(runs("0.18.5", ENDS, trainfix=True, ranks=2)[name])


def test_no_optimizer_of_that_kind_is_built_by_0_18_4(runs):
    """It has another error there: a loss scale that is divided out and never multiplied in."""
    result = runs("0.18.4", {"4 steps": BASE}, trainfix=True)["4 steps"]
    assert states(result)["TF-0007"] == "not-affected"
    for window in windows(result):
        assert window["coefficients"] == pytest.approx([2**-16] * 4, rel=1e-2)


def test_0_19_0_is_left_alone(next_release):
    assert states(next_release["4 steps"])["TF-0007"] == "fixed-upstream"
    assert "DeepSpeedEngine._backward_epilogue" not in next_release["untouched"]["wrapped by trainfix"]


def test_revert_in_mid_window_lets_that_window_finish_on_0_18_9(repaired):
    """Reverted in the middle of the second window. Applied in the middle of the fourth, it is in time for that one."""
    first, second, third, fourth, fifth = windows(repaired["revert"])
    for window in (first, second, fourth, fifth):
        assert_window_right(window)
    assert third["captured"]["relative_error"] > 0.1
    assert "TF-0007" in repaired["revert"]["back"]
    assert repaired["revert"]["left on the optimizer"] == []
    assert repaired["revert"]["left on the engine"] == []


def test_a_resumed_run_on_0_18_9_goes_on_as_the_uninterrupted_one(repaired):
    assert_right(repaired["resume"])
    assert repaired["resume"]["resumed"] == repaired["resume"]["uninterrupted"]


def test_where_it_is_refused_such_an_optimizer_is_stopped_when_it_is_built(tmp_path):
    """0.18.9 with another text in a comparison of `update_hp_grads`, which the repair relies on."""
    folder = shutil.copytree(release("0.18.9"), tmp_path / "deepspeed-0.18.9")
    file = folder / "deepspeed/runtime/bf16_optimizer.py"
    text = file.read_text()
    assert text.count("if lp.grad is None:\n                    continue") == 1
    file.write_text(
        text.replace(
            "if lp.grad is None:\n                    continue",
            "if not lp.requires_grad:\n                    continue",
        )
    )
    stopped, immediate = experiment.run(folder, [BASE, RIGHT["immediate_grad_update"]], trainfix=True, ranks=2)
    assert "TF-0007 is reached and not repaired" in stopped["error"]
    assert states(stopped)["TF-0007"] == "refused"
    assert_right(immediate)
