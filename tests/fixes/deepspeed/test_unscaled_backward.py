"""TF-0008: what `backward(scale_wrt_gas=False)` gives the optimizer, without trainfix and with it.

TF-0032, which the same fix repairs: test_backward_division.py.
"""

from __future__ import annotations

import shutil

import pytest

from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, assert_window_right, states, windows
from tests.support import experiment
from tests.support.releases import release

pytestmark = pytest.mark.slow

PLACES = {
    "stage 0": {"stage": 0, "offload": False},
    **{f"stage {stage}": {"stage": stage, "offload": False} for stage in (1, 2, 3)},
    **{f"stage {stage}, offload": {"stage": stage} for stage in (1, 2, 3)},
}
UNSCALED = {
    **{name: {**place, "backward": "unscaled"} for name, place in PLACES.items()},
    "stage 2, offload, bf16": {**PLACES["stage 2, offload"], "dtype": "bf16", "backward": "unscaled"},
    "fp16": {**PLACES["stage 1"], "dtype": "fp16", "backward": "unscaled"},
    "3 steps": {**PLACES["stage 2"], "ga": 3, "backward": "unscaled"},
    "8 steps": {**PLACES["stage 1"], "ga": 8, "backward": "unscaled"},
    "boundary by hand": {**PLACES["stage 2"], "driver": "boundary", "backward": "unscaled"},
    "reentrant checkpointing": {**PLACES["stage 1"], "checkpointing": "reentrant", "backward": "unscaled"},
}
IN_TURN = {
    "unscaled, then scaled": {**PLACES["stage 0"], "backward": "unscaled,engine"},
    "scaled, then unscaled": {**PLACES["stage 2"], "backward": "engine,unscaled"},
    "unscaled, then loss.backward()": {**PLACES["stage 1"], "backward": "unscaled,torch"},
}
DIVIDED_ONCE = {
    **{f"{name}, backward(loss)": PLACES[name] for name in ("stage 0", "stage 1", "stage 2", "stage 3")},
    **{f"{name}, loss.backward()": {**PLACES[name], "backward": "torch"} for name in ("stage 1", "stage 2", "stage 3")},
    "one step": {**PLACES["stage 2"], "ga": 1, "backward": "unscaled"},
    "an engine of one step": {**PLACES["stage 1"], "driver": "accelerate", "backward": "unscaled"},
}
ONE_RANK = UNSCALED | IN_TURN | DIVIDED_ONCE
REVERT = {"revert": {**PLACES["stage 1"], "scenario": "revert", "windows": 5, "backward": "unscaled"}}
UNTOUCHED = {"untouched": {"scenario": "untouched"}}
LATE = {"late import": {**PLACES["stage 1"], "scenario": "late_import", "backward": "unscaled"}}
TWO_RANKS = {name: UNSCALED[name] for name in ("stage 0", "stage 1", "stage 2", "stage 3")}
WITH_TF_0001 = [name for name in UNSCALED if name.startswith("stage 2, offload")]
WITHOUT_TF_0001 = [name for name in UNSCALED if name not in WITH_TF_0001]


@pytest.fixture(scope="module")
def unpatched(runs):
    """DeepSpeed 0.18.3 on one rank."""
    return runs("0.18.3", ONE_RANK | LATE, trainfix=False, env={"TRAINFIX": "on"})


@pytest.fixture(scope="module")
def repaired(runs):
    """DeepSpeed 0.18.3 on one rank, `import trainfix` first."""
    return runs("0.18.3", ONE_RANK | UNTOUCHED | REVERT, trainfix=True)


@pytest.fixture(scope="module")
def next_release(runs):
    """DeepSpeed 0.18.4 on one rank, `import trainfix` first, which repairs TF-0001 and TF-0032 there."""
    return runs("0.18.4", UNSCALED, trainfix=True)


def assert_divided(result, expected):
    for window in windows(result):
        assert window["coefficients"] == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("name", WITHOUT_TF_0001)
def test_0_18_3_divides_by_the_steps_what_the_caller_has_divided(unpatched, name):
    steps = UNSCALED[name].get("ga", 4)
    assert_divided(unpatched[name], [1 / steps] * steps)


@pytest.mark.parametrize("name", WITH_TF_0001)
def test_0_18_3_divides_what_tf_0001_leaves_of_it_in_zero2_with_offload(unpatched, name):
    assert_divided(unpatched[name], [1 / 4, 0, 0, 1 / 4])


@pytest.mark.parametrize("name", UNSCALED)
def test_0_18_3_leaves_it_as_it_is_with_trainfix(repaired, name):
    assert_right(repaired[name])
    assert states(repaired[name])["TF-0008"] == "applied"


@pytest.mark.parametrize("name", WITHOUT_TF_0001)
def test_0_18_3_with_trainfix_gives_the_bits_of_0_18_4(repaired, next_release, name):
    assert_same_bits(repaired[name], next_release[name])


@pytest.mark.parametrize("name", IN_TURN)
def test_the_setting_does_not_leak_into_the_next_backward_on_0_18_3(unpatched, repaired, name):
    pair = [1, 1 / 4] if IN_TURN[name]["backward"].startswith("engine") else [1 / 4, 1]
    assert_divided(unpatched[name], pair * 2)
    assert_right(repaired[name])


@pytest.mark.parametrize("name", DIVIDED_ONCE)
def test_what_0_18_3_divides_once_stays_the_same_bit_for_bit(unpatched, repaired, name):
    assert_right(unpatched[name])
    assert_same_bits(unpatched[name], repaired[name])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_on_0_18_3_keep_the_scale_only_with_trainfix(runs, name):
    assert_divided(runs("0.18.3", TWO_RANKS, trainfix=False, ranks=2)[name], [1 / 4] * 4)
    assert_right(runs("0.18.3", TWO_RANKS, trainfix=True, ranks=2)[name])


def wrapped(results):
    targets = {"DeepSpeedEngine.backward", "DeepSpeedEngine._backward_prologue_per_tensor"}
    return targets & set(results["untouched"]["wrapped by trainfix"])


@pytest.mark.parametrize("name", UNSCALED)
def test_0_18_4_is_right(next_release, name):
    assert_right(next_release[name])
    assert states(next_release[name])["TF-0008"] == "fixed-upstream"


@pytest.mark.parametrize("name", WITHOUT_TF_0001)
def test_0_18_4_stays_the_same_bit_for_bit(runs, next_release, name):
    table = {one: UNSCALED[one] for one in WITHOUT_TF_0001}
    assert_same_bits(runs("0.18.4", table, trainfix=False)[name], next_release[name])


@pytest.mark.parametrize("name", ["stage 0", "stage 1", "stage 3"])
def test_0_18_2_is_right_and_left_alone(runs, name):
    table = {name: UNSCALED[name] for name in ("stage 0", "stage 1", "stage 3")} | UNTOUCHED
    results = runs("0.18.2", table, trainfix=True)
    assert_right(results[name])
    assert states(results[name])["TF-0008"] == "not-affected"
    assert not wrapped(results)


def test_the_same_check_finds_the_repair_on_0_18_3(repaired):
    assert "DeepSpeedEngine._backward_prologue_per_tensor" in wrapped(repaired)


def test_revert_in_mid_window_lets_that_window_finish_on_0_18_3(repaired):
    """Reverted in the middle of the second window, applied again in the middle of the fourth."""
    first, second, third, fourth, fifth = windows(repaired["revert"])
    for window in (first, second, fifth):
        assert_window_right(window)
    for window in (third, fourth):
        assert window["coefficients"] == pytest.approx([1 / 4] * 4, abs=1e-3)
    assert "TF-0008" in repaired["revert"]["back"]
    assert repaired["revert"]["left on the engine"] == []


def test_import_in_mid_window_repairs_the_next_window_on_0_18_3(unpatched):
    result = unpatched["late import"]
    assert result["error"] is None
    before, during, after = result["in mid-window"]
    for window in (before, during):
        assert window["coefficients"] == pytest.approx([1 / 4] * 4, abs=1e-3)
    assert_window_right(after)
    for window in result["before its first window"]:
        assert_window_right(window)


def test_where_it_is_refused_only_such_a_backward_is_stopped(tmp_path):
    """0.18.3 with another text in a message of `forward`, which the repair relies on."""
    folder = shutil.copytree(release("0.18.3"), tmp_path / "deepspeed-0.18.3")
    file = folder / "deepspeed/runtime/engine.py"
    text = file.read_text()
    assert text.count("executing without DeepCompile until") == 1
    file.write_text(text.replace("executing without DeepCompile until", "executing without it until"))
    wanted = [UNSCALED["stage 1"], DIVIDED_ONCE["stage 1, backward(loss)"], DIVIDED_ONCE["one step"]]
    stopped, scaled, one_step = experiment.run(folder, wanted, trainfix=True)
    assert "TF-0008 is reached and not repaired" in stopped["error"]
    assert "backward(scale_wrt_gas=False) with gradient_accumulation_steps = 4" in stopped["error"]
    assert states(stopped)["TF-0008"] == "refused"
    assert_right(scaled)
    assert_right(one_step)
