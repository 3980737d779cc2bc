"""transformers 4.46.1 to 4.54.1: what is wrong in a window without trainfix, by its size, and right with it.

Every combination of shapes that the repair knows is run once, both ends of each band among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.fixes.transformers.conftest import Results
from tests.fixes.transformers.judging import assert_right, coefficients, states, windows

pytestmark = pytest.mark.slow
Runs = Callable[..., Results]

CHANGES = "tests.fixes.transformers.window_changes:"
CLIPPED = {"max_grad_norm": 1e9}  # so that all releases log the norm
DEEPSPEED = {"stage": 1}
NO_COUNT = {"prepare": f"{CHANGES}takes_no_count"}


def configuration(ranks: int = 1, **more: Any) -> dict[str, Any]:
    """Windows of four micro-batches on each rank, with an epoch of six, so that every second window is a short one."""
    return {"steps": 4, "rows": 6 * ranks, "max_steps": 2, "arguments": CLIPPED, **more}


def table(ranks: int = 1, *, deepspeed: bool = False) -> dict[str, dict[str, Any]]:
    """Models that take the number of tokens and models that do not. DeepSpeed last: accelerate does not forget it."""
    found = {"count": configuration(ranks), "mean": configuration(ranks, **NO_COUNT)}
    if deepspeed:
        found["count, deepspeed"] = configuration(ranks, deepspeed=DEEPSPEED)
        found["mean, deepspeed"] = configuration(ranks, deepspeed=DEEPSPEED, **NO_COUNT)
    return found


def packages(transformers: str, deepspeed: bool = False, **more: str) -> dict[str, str]:
    return {"transformers": transformers, **({"deepspeed": "0.16.9"} if deepspeed else {}), **more}


# Release -> on how many ranks it is run, and whether under DeepSpeed too.
REPAIRED: Mapping[str, tuple[int, bool]] = {
    "4.46.1": (2, False),  # with several ranks under DeepSpeed 0.16 and newer, 4.46 stops with an error of its own
    "4.46.2": (1, True),
    "4.46.3": (2, False),
    "4.47.0": (1, True),  # the same
    "4.47.1": (1, True),
    "4.48.0": (2, True),
    "4.48.1": (1, False),
    "4.48.3": (2, True),
    "4.49.0": (1, False),
    "4.50.0": (1, False),
    "4.51.0": (1, False),
    "4.52.4": (2, False),
    "4.53.0": (1, False),
    "4.53.3": (2, True),
    "4.54.1": (1, False),
}


@pytest.mark.parametrize("release", REPAIRED)
def test_every_token_of_every_window_counts_the_same_with_trainfix(release: str, runs: Runs) -> None:
    ranks, deepspeed = REPAIRED[release]
    for name, result in runs(
        packages(release, deepspeed), table(ranks, deepspeed=deepspeed), trainfix=True, ranks=ranks
    ).items():
        assert [len(window["tokens"]) for window in windows(result)] == lengths(release, ranks), name
        assert_right(result)


def test_on_two_ranks_4_46_2_keeps_the_last_micro_batch_to_its_own_rank_only_without_trainfix(runs: Runs) -> None:
    """Also where every micro-batch is the last of its window: then nothing is averaged."""
    table = {"accumulated": configuration(2, rows=8, lengths=[5]), "plain": {"steps": 1, "rows": 4, "lengths": [5]}}
    unrepaired, repaired = (runs(packages("4.46.2"), table, trainfix=on, ranks=2) for on in (False, True))
    assert coefficients(unrepaired["accumulated"])[0] == pytest.approx([1, 1, 1, 2, 1, 1, 1, 0], abs=1e-3)
    assert coefficients(unrepaired["plain"]) == [pytest.approx([2, 0], abs=1e-3)] * 2
    for result in repaired.values():
        assert_right(result)


def lengths(release: str, ranks: int) -> list[int]:
    """4.46 makes windows of four across epochs, later releases end the epoch with a window of two."""
    return [4 * ranks, 4 * ranks if release.startswith("4.46.") else 2 * ranks]


@pytest.fixture(scope="session")
def wrong(runs: Runs) -> Callable[[str], Results]:
    """The same without trainfix."""

    def run(release: str) -> Results:
        ranks, deepspeed = REPAIRED[release]
        return runs(packages(release, deepspeed), table(ranks, deepspeed=deepspeed), trainfix=False, ranks=ranks)

    return run


@pytest.mark.parametrize("release", ["4.46.1", "4.46.3", "4.48.3", "4.53.3"])
def test_a_token_counts_as_much_as_its_rank_has_few_of_them(release: str, wrong: Callable[[str], Results]) -> None:
    """TF-0402, with 158 and 68 tokens on the two ranks."""
    result = wrong(release)["count"]
    assert windows(result)[0]["tokens"] == [2, 4, 61, 91, 3, 2, 2, 61]
    assert coefficients(result)[0] == pytest.approx([113 / 158] * 4 + [113 / 68] * 4, abs=1e-3)


@pytest.mark.parametrize(("release", "name"), [("4.46.2", "count"), ("4.47.1", "count"), ("4.48.0", "mean")])
def test_under_deepspeed_the_gradient_is_a_quarter(release: str, name: str, wrong: Callable[[str], Results]) -> None:
    """TF-0403; what is logged as the loss is right."""
    result = wrong(release)[f"{name}, deepspeed"]
    assert windows(result)[0]["scale"] == pytest.approx(0.25, abs=1e-3)
    first = windows(result)[0]
    assert result["logs"][0]["loss"] == pytest.approx(first["exact_loss"], rel=0.02)


def test_under_deepspeed_4_48_3_divides_twice_for_both_kinds_of_models(wrong: Callable[[str], Results]) -> None:
    found = wrong("4.48.3")
    assert [windows(found[name])[0]["scale"] for name in ("count, deepspeed", "mean, deepspeed")] == pytest.approx(
        [0.25, 0.25], abs=1e-3
    )


@pytest.mark.parametrize("release", ["4.48.0", "4.48.3", "4.53.3"])
def test_a_short_window_of_means_is_divided_by_the_configured_steps(
    release: str, wrong: Callable[[str], Results]
) -> None:
    """TF-0406."""
    full, short = windows(wrong(release)["mean"])
    assert (full["scale"], short["scale"]) == pytest.approx((1.0, 0.5), abs=1e-3)
    assert full["relative_error"] > 0.2  # a mean of means


@pytest.mark.parametrize("release", ["4.47.0", "4.48.0"])
def test_the_count_is_lost_and_the_gradient_four_times_too_large(release: str, wrong: Callable[[str], Results]) -> None:
    """TF-0407; under DeepSpeed the engine's division hides the factor in the gradient, not in the log."""
    found = wrong(release)
    assert windows(found["count"])[0]["scale"] == pytest.approx(4.0, abs=1e-3)
    assert windows(found["count, deepspeed"])[0]["scale"] == pytest.approx(1.0, abs=1e-3)
    for name in ("count", "count, deepspeed"):
        first = windows(found[name])[0]
        assert first["relative_error"] > 0.2
        assert found[name]["logs"][0]["loss"] == pytest.approx(4 * first["exact_loss"], rel=0.02)


@pytest.mark.parametrize(("release", "logged"), [("4.46.1", 4), ("4.47.0", 1), ("4.47.1", 4)])
def test_nobody_divides_a_mean_by_the_steps(release: str, logged: int, wrong: Callable[[str], Results]) -> None:
    """TF-0408."""
    result = wrong(release)["mean"]
    first = windows(result)[0]
    assert first["scale"] == pytest.approx(4.0, abs=1e-3)
    assert result["logs"][0]["loss"] == pytest.approx(logged * first["exact_loss"], rel=0.02)


def test_4_46_divides_a_window_across_epochs_by_two_counts(wrong: Callable[[str], Results]) -> None:
    """TF-0410; and the ranks go apart: the second one's last two micro-batches are not in the first one's gradient."""
    second = coefficients(wrong("4.46.3")["count"])[1]
    assert second[:2] == pytest.approx([1.833, 1.833], abs=1e-3)
    assert second[6:] == pytest.approx([0.0, 0.0], abs=1e-3)


def test_accelerate_1_7_leaves_deepspeed_counting_across_epochs(wrong: Callable[[str], Results]) -> None:
    """TF-0501: 4.53.3 takes its second step at the end of the first epoch, the engine would in the second one."""
    result = wrong("4.53.3")["count, deepspeed"]
    assert [len(window["tokens"]) for window in windows(result)] == [8]
    assert result["left_over"] == 2


FEWER = {"rows": 14, "max_steps": 4, "steps": 4, "arguments": CLIPPED}  # on two ranks


def test_the_end_of_an_epoch_goes_into_the_next_epochs_first_window(runs: Runs) -> None:
    """TF-0409 in 4.51.3: 14 rows, two ranks, four steps."""
    second = windows(runs(packages("4.51.3"), {"fewer": FEWER}, trainfix=False, ranks=2)["fewer"])[1]
    assert len(second["tokens"]) == 12
    assert second["scale"] == pytest.approx(2.0, abs=1e-2)


def test_the_end_of_an_epoch_is_a_window_of_its_own_with_trainfix(runs: Runs) -> None:
    result = runs(packages("4.51.3"), {"fewer": FEWER}, trainfix=True, ranks=2)["fewer"]
    assert [len(window["tokens"]) for window in windows(result)] == [8, 6, 8, 6]
    assert_right(result)


FULL = {"steps": 4, "rows": 16, "arguments": CLIPPED}
SPARSE = [0, 3, 0, 7, 2, 0, 0, 0, 5, 1, 61, 2]
EDGES: dict[str, dict[str, Any]] = {
    "no trained token in a window": {**FULL, "lengths": [0] * 8 + [3, 5, 0, 9, 0, 1, 2, 8]},
    "none in some micro-batches": {**FULL, "lengths": SPARSE},
    "none in some micro-batches, means": {**FULL, "lengths": SPARSE, **NO_COUNT},
    "the first token of a row has a label": {**FULL, "prompt_trained": True},
    "tokens are added up over the ranks already": {
        **FULL,
        "arguments": {**CLIPPED, "average_tokens_across_devices": True},
    },
    "two rows in a micro-batch, two epochs": {**FULL, "rows": 28, "rows_per_batch": 2, "epochs": 2},
}
BACK: dict[str, dict[str, Any]] = {
    "reverted": {**FULL, "rows": 24, "prepare": f"{CHANGES}reverts_in_the_second_window"},
    "applied": {**FULL, "rows": 24, "prepare": f"{CHANGES}repaired_from_the_second_window_on"},
}
OWN: dict[str, dict[str, Any]] = {
    "overridden": {**FULL, "trainer": f"{CHANGES}OwnLoss"},
    "of the object": {**FULL, "prepare": f"{CHANGES}own_loss_of_the_object"},
    "a function": {**FULL, "prepare": f"{CHANGES}own_function"},
    "of the model": {**FULL, "prepare": f"{CHANGES}own_forward"},
}


@pytest.fixture(scope="session")
def edges(runs: Runs) -> Results:
    return runs(packages("4.53.3"), EDGES | OWN | BACK, trainfix=True, ranks=2)


@pytest.mark.parametrize("name", EDGES)
def test_rare_windows_are_right_too(name: str, edges: Results) -> None:
    result = edges[name]
    if name.startswith("no trained token"):
        assert windows(result)[0]["exact_norm"] == 0.0
        assert result["logs"][0]["loss"] == result["logs"][0]["grad_norm"] == 0.0
    assert_right(result)


FACTORS = [("overridden", 2), ("of the object", 2), ("a function", 1), ("of the model", 1)]


@pytest.mark.parametrize(("name", "factor"), FACTORS)
def test_a_loss_of_the_users_own_is_left_alone(name: str, factor: int, edges: Results) -> None:
    for window in windows(edges[name]):
        assert window["tokens"] == [2, 4, 61, 91, 3, 2, 2, 61]
        wanted = [factor * 113 / 158] * 4 + [factor * 113 / 68] * 4
        assert window["coefficients"] == pytest.approx(wanted, abs=1e-3)


def test_a_window_is_repaired_as_a_whole_or_not_at_all(edges: Results) -> None:
    """Reverted, and applied, between the micro-batches of the second window."""
    right = [[window["relative_error"] < 1e-4 for window in windows(edges[name])] for name in BACK]
    assert right == [[True, True, False], [False, False, True]]


def test_4_46_does_not_take_over_what_an_earlier_training_left(runs: Runs) -> None:
    """With epochs of 7 micro-batches, three have been read and not been trained when the first training ends."""
    twice = {"twice": configuration(rows=7, prepare=f"{CHANGES}trains_twice")}
    found = windows(runs(packages("4.46.3"), twice, trainfix=True)["twice"])
    assert [window["tokens"] for window in found] == 2 * [[2, 3, 4, 2], [61, 2, 91, 2]]
    assert max(window["relative_error"] for window in found) < 1e-4


def test_4_55_0_has_none_of_these_errors_and_is_left_as_it_is(runs: Runs) -> None:
    untouched = {"count": configuration(), "functions": configuration(prepare=f"{CHANGES}is_untouched")}
    found = runs(packages("4.55.0"), untouched, trainfix=True)
    for result in found.values():
        assert_right(result)
    ours = ["TF-0402", "TF-0403", "TF-0406", "TF-0407", "TF-0408", "TF-0409", "TF-0410"]
    assert {states(found["count"])[id] for id in ours} == {"fixed-upstream"}


UNKNOWN = {"trainer.py": ("batch_samples += [next(epoch_iterator)]", "batch_samples.append(next(epoch_iterator))")}


def test_an_unknown_body_is_refused_and_only_a_run_that_reaches_an_error_stops(runs: Runs) -> None:
    """4.48.3 with another call in get_batch_samples."""
    cases = {"count": configuration(), "deepspeed": configuration(deepspeed=DEEPSPEED)}
    found = runs(packages("4.48.3", True), cases, trainfix=True, altered=UNKNOWN)
    assert_right(found["count"])
    records = {one["id"]: one for one in found["count"]["status"]}
    assert records["TF-0403"]["state"] == "refused"
    assert "Trainer.get_batch_samples has an unknown body" in records["TF-0403"]["reason"]
    assert found["deepspeed"]["error"].startswith("UnfixedBugError: TF-0403 is reached and not repaired")
