"""OpenRLHF's own SFTTrainer with DeepSpeed on the CPU: how much every trained token counts, with and without trainfix.

The expected sizes are those of a tiny Llama and answers of 2 to 91 tokens (tests/support/openrlhf_runs.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import openrlhf_runs, stacks

from .conftest import on_folders

Run = Callable[..., dict[str, dict[str, Any]]]
pytestmark = pytest.mark.slow

REPAIRED = {"0.7.0": "TF-0101", "0.9.10": "TF-0101", "0.10.2": "TF-0101", "0.10.3": "TF-0102"} | {
    "0.10.4": "TF-0103",
    "0.11.1": "TF-0103",
}
HERE = "tests.fixes.openrlhf.changes"

# On one rank an epoch has 6 micro-batches, in windows of 4: the second window spans both epochs.
TWO_EPOCHS = {"steps": 4, "rows": 6, "epochs": 2}
ONE_RANK: Mapping[str, Mapping[str, Any]] = {
    "two windows": {"rows": 16},
    "two epochs": TWO_EPOCHS,
    "incomplete": {"steps": 4, "rows": 10},
    "empty micro-batches": {"steps": 4, "rows": 12, "lengths": [0, 3, 60, 0, 0, 0, 0, 0, 7, 5, 0, 2]},
    "two fits": {"steps": 4, "rows": 6, "fits": 2},
    "in mid-window": {"steps": 4, "rows": 6, "epochs": 2, "prepare": f"{HERE}:begin_a_window"},
    "one micro-batch": {"steps": 1, "rows": 4},
    "evaluated": {"steps": 4, "lengths": [9], "evaluation": 4},
    "own loss": {"rows": 16, "prepare": f"{HERE}:own_loss"},
    "half weights": {"prepare": f"{HERE}:half_weights"},
    "clipped": {"clip": 0.1},
    "failing": {"prepare": f"{HERE}:fail_at_the_first_log"},
    "offload": {"offload": True},
}
TWO_RANKS: Mapping[str, Mapping[str, Any]] = {
    "two windows": {"rows": 32},
    "two epochs": {"steps": 4, "rows": 12, "epochs": 2},
    "empty micro-batches": {"steps": 2, "rows": 8, "lengths": [0, 0, 0, 0, 7, 0, 60, 5]},
    "rows in batches": {"steps": 2, "rows": 16, "rows_per_batch": 2},
    "packed": {"steps": 2, "rows": 16, "rows_per_batch": 2, "packing": True},
    "resumed": {"steps": 2, "rows": 12, "epochs": 2, "consumed": 4},
    "no accumulation": {"steps": 1, "rows": 8},
}
# One run of each end of a band: repaired, and with the repair taken out.
ENDS: Mapping[str, Mapping[str, Any]] = {"repaired": TWO_EPOCHS, "reverted": TWO_EPOCHS}


def right(result: Mapping[str, Any], windows: int) -> None:
    """Every token of every window counts the same, and a person is told the true loss and norm."""
    assert result["error"] is None
    assert len(result["windows"]) == windows
    told = [line for line in result["logs"] if "train/loss_mean" in line]
    assert len(told) == windows
    for window, line in zip(result["windows"], told, strict=True):
        assert window["relative_error"] < 1e-5
        assert window["scale"] == pytest.approx(1, abs=1e-3)
        assert [weight for weight in window["weights"] if weight == weight] == pytest.approx(
            [1] * sum(map(bool, window["tokens"])), abs=1e-3
        )
        assert line["train/loss_mean"] == line["train/gpt_loss"] == pytest.approx(window["exact_loss"], rel=1e-4)
        assert line.get("train/grad_norm", window["exact_norm"]) == pytest.approx(window["exact_norm"], rel=1e-4)
    assert result["as_before"]


def mean_of_means(window: Mapping[str, Any]) -> list[float]:
    """How much each micro-batch counts where each is averaged over its own tokens."""
    tokens = window["tokens"]
    return [sum(tokens) / len(tokens) / own for own in tokens]


@pytest.fixture(scope="session")
def one_rank(runs: Run) -> dict[str, dict[str, Any]]:
    return runs("0.9.10", ONE_RANK)


@pytest.fixture(scope="session")
def one_rank_without(runs: Run) -> dict[str, dict[str, Any]]:
    names = "two windows", "empty micro-batches", "one micro-batch", "evaluated", "own loss"
    return runs("0.9.10", {name: ONE_RANK[name] for name in names}, trainfix=False)


@pytest.fixture(scope="session")
def two_ranks(runs: Run) -> dict[str, dict[str, Any]]:
    return runs("0.9.10", {**TWO_RANKS, "reverted": TWO_RANKS["two windows"] | {"reverted": ["TF-0101"]}}, ranks=2)


def test_0_9_10_weights_a_token_of_a_short_answer_up_to_45_times_as_much_as_one_of_a_long_answer(
    one_rank_without: dict[str, dict[str, Any]],
) -> None:
    for window in one_rank_without["two windows"]["windows"]:
        assert window["tokens"] == [2, 3, 4, 2, 61, 2, 91, 61]
        assert window["coefficients"] == pytest.approx(mean_of_means(window), rel=1e-3)
        assert max(window["weights"]) / min(window["weights"]) == pytest.approx(91 / 2, rel=1e-2)
        assert window["relative_error"] > 2
        assert window["cosine"] < 0.5


def test_0_9_10_loses_the_gradient_to_a_micro_batch_without_a_trained_token(
    one_rank_without: dict[str, dict[str, Any]],
) -> None:
    assert "NaN" in one_rank_without["empty micro-batches"]["error"]


def test_with_trainfix_every_token_counts_the_same(one_rank: dict[str, dict[str, Any]]) -> None:
    right(one_rank["two windows"], windows=2)


def test_windows_go_on_from_epoch_to_epoch(one_rank: dict[str, dict[str, Any]]) -> None:
    right(one_rank["two epochs"], windows=3)
    assert [window["tokens"] for window in one_rank["two epochs"]["windows"]] == [
        [2, 3, 4, 2],
        [61, 2, 2, 3],
        [4, 2, 61, 2],
    ]


def test_a_last_incomplete_window_is_not_run_because_the_engine_would_not_apply_it(
    one_rank: dict[str, dict[str, Any]],
) -> None:
    right(one_rank["incomplete"], windows=2)
    assert one_rank["incomplete"]["left_over"] == 0


def test_micro_batches_and_windows_without_a_trained_token_add_nothing(one_rank: dict[str, dict[str, Any]]) -> None:
    right(one_rank["empty micro-batches"], windows=3)
    assert [sum(window["tokens"]) for window in one_rank["empty micro-batches"]["windows"]] == [63, 0, 14]


def test_a_second_fit_begins_at_a_window_of_the_engine(one_rank: dict[str, dict[str, Any]]) -> None:
    right(one_rank["two fits"], windows=2)


def test_a_window_that_began_without_trainfix_is_left_as_it_began_and_the_next_is_right(
    one_rank: dict[str, dict[str, Any]],
) -> None:
    before, begun, *others = one_rank["in mid-window"]["windows"]
    assert [begun["tokens"], *(one["tokens"] for one in others)] == [[61, 2, 2, 3], [4, 2, 61, 2], [2, 3, 4, 2]]
    for window in (before, begun):
        assert window["coefficients"] == pytest.approx(mean_of_means(window), rel=1e-3)
    assert all(window["relative_error"] < 1e-5 for window in others)
    assert one_rank["in mid-window"]["logs"][-1]["train/loss_mean"] == pytest.approx(others[0]["exact_loss"], rel=1e-4)


def test_weights_of_tokens_are_weights(one_rank: dict[str, dict[str, Any]]) -> None:
    right(one_rank["half weights"], windows=1)


def test_clipping_sees_the_true_norm(one_rank: dict[str, dict[str, Any]]) -> None:
    (line,) = one_rank["clipped"]["logs"]
    (window,) = one_rank["clipped"]["windows"]
    assert line["train/grad_norm"] == pytest.approx(window["exact_norm"], rel=1e-4)


def test_with_the_optimizer_on_the_cpu_too(one_rank: dict[str, dict[str, Any]]) -> None:
    right(one_rank["offload"], windows=1)


def test_a_run_of_one_micro_batch_per_step_on_one_rank_is_bitwise_the_releases(
    one_rank: dict[str, dict[str, Any]], one_rank_without: dict[str, dict[str, Any]]
) -> None:
    ours, theirs = one_rank["one micro-batch"], one_rank_without["one micro-batch"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["logs"] == theirs["logs"]


def test_a_loss_of_the_users_own_is_left_alone(
    one_rank: dict[str, dict[str, Any]], one_rank_without: dict[str, dict[str, Any]]
) -> None:
    ours, theirs = one_rank["own loss"], one_rank_without["own loss"]
    assert ours["error"] is None
    assert ours["parameters"] == theirs["parameters"]
    assert ours["logs"] == theirs["logs"]


def test_an_evaluation_between_windows_has_the_loss_that_it_had(
    one_rank: dict[str, dict[str, Any]], one_rank_without: dict[str, dict[str, Any]]
) -> None:
    def told(result: Mapping[str, Any]) -> list[float]:
        return [line["eval/eval gpt_loss"] for line in result["logs"] if "eval/eval gpt_loss" in line]

    # All answers are equally long, so both train the same; those of the evaluation are not.
    assert len(told(one_rank["evaluated"])) == 2
    assert told(one_rank["evaluated"]) == pytest.approx(told(one_rank_without["evaluated"]), rel=1e-6)


def test_a_fit_that_fails_leaves_the_trainer_as_it_was(one_rank: dict[str, dict[str, Any]]) -> None:
    assert "the log is full" in one_rank["failing"]["error"]
    assert one_rank["failing"]["as_before"]


def test_two_ranks_and_accumulation_are_a_mean_of_means_and_right_with_trainfix(
    two_ranks: dict[str, dict[str, Any]],
) -> None:
    for window in two_ranks["reverted"]["windows"]:
        assert window["coefficients"] == pytest.approx(mean_of_means(window), rel=1e-3)
    assert [len(window["tokens"]) for window in two_ranks["two windows"]["windows"]] == [16, 16]
    right(two_ranks["two windows"], windows=2)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("two epochs", 3),
        ("empty micro-batches", 2),
        ("rows in batches", 2),
        ("packed", 2),
        ("resumed", 5),
        ("no accumulation", 4),
    ],
)
def test_on_two_ranks_every_token_counts_the_same(
    two_ranks: dict[str, dict[str, Any]], name: str, windows: int
) -> None:
    right(two_ranks[name], windows)


@pytest.mark.parametrize(
    ("version", "ranks"), [("0.7.0", 1), ("0.10.2", 1), ("0.10.3", 2), ("0.10.4", 1), ("0.11.1", 2)]
)
def test_at_the_ends_of_each_band_the_error_is_there_without_the_repair_and_gone_with_it(
    runs: Run, version: str, ranks: int
) -> None:
    advisory, rows = REPAIRED[version], {"rows": 6 * ranks}
    table = {"repaired": ENDS["repaired"] | rows, "reverted": ENDS["reverted"] | rows | {"reverted": [advisory]}}
    found = runs(version, table, ranks=ranks)
    right(found["repaired"], windows=3)
    assert found["repaired"]["replaced"] == ["__init__", "fit"]
    assert found["reverted"]["replaced"] == []
    wrong = found["reverted"]["windows"]
    if advisory == "TF-0103":  # the first window is right; parts of two are added up from there on
        assert wrong[0]["relative_error"] < 1e-5
        assert all(window["relative_error"] > 0.5 for window in wrong[1:])
    elif advisory == "TF-0102":  # ranks in order: the micro-steps of one rank, then those of the other
        tokens = wrong[0]["tokens"]
        pairs = [own + other for own, other in zip(tokens[:4], tokens[4:], strict=True)]
        expected = [sum(tokens) / 4 / pair for pair in pairs] * 2
        assert wrong[0]["coefficients"] == pytest.approx(expected, rel=1e-3)
    else:
        assert all(window["coefficients"] == pytest.approx(mean_of_means(window), rel=1e-3) for window in wrong)


def test_0_11_2_is_right_and_its_own_functions_stay_in_place(runs: Run) -> None:
    result = runs("0.11.2", {"two epochs": TWO_EPOCHS})["two epochs"]
    assert all(window["relative_error"] < 1e-5 for window in result["windows"])
    assert result["replaced"] == []
    states = {record["id"]: record["state"] for record in result["status"]}
    assert {states[id] for id in ("TF-0101", "TF-0102", "TF-0103")} == {"fixed-upstream"}


def test_0_6_4_is_stopped_where_it_averages_means_and_says_which_release_is_repaired(runs: Run) -> None:
    table = {"two epochs": TWO_EPOCHS, "one micro-batch": {"steps": 1, "rows": 4}}
    stopped = runs("0.6.4", table)
    assert stopped["two epochs"]["error"].startswith("UnfixedBugError: TF-0106 is reached and not repaired")
    assert "4 accumulated micro-batches" in stopped["two epochs"]["error"]
    assert "move to openrlhf 0.7.0 or newer" in stopped["two epochs"]["error"]
    assert stopped["one micro-batch"]["error"] is None


def test_a_fit_that_nobody_knows_is_refused_and_not_touched(tmp_path: Path) -> None:
    original = stacks.folder("openrlhf", "0.9.10")
    changed = tmp_path / "openrlhf"
    shutil.copytree(original, changed)
    source = changed / "openrlhf" / "trainer" / "sft_trainer.py"
    text = source.read_text(encoding="utf-8")
    assert text.count("step += 1") == 1
    source.write_text(text.replace("step += 1", "step = step + 1"), encoding="utf-8")
    folders = [changed if folder == original else folder for folder in openrlhf_runs.stack("0.9.10")]
    (result,) = on_folders(folders, [{"steps": 4}], trainfix=True)
    record = next(one for one in result["status"] if one["id"] == "TF-0101")
    assert record["state"] == "refused"
    assert "SFTTrainer.fit has an unknown body" in record["reason"]
    assert result["replaced"] == ["__init__"]  # the guard, which warns
    assert result["windows"][0]["coefficients"] == pytest.approx(mean_of_means(result["windows"][0]), rel=1e-3)


@pytest.mark.parametrize(
    ("state", "optimizer", "loss"),
    [("nothing", False, False), ("loss only", False, True), ("optimizer only", True, False), ("both", True, True)],
)
def test_openrlhf_0_9_10_with_its_deepspeed_0_18_9_and_offload_is_right_only_with_both_repairs(
    once: Callable[..., Any], state: str, optimizer: bool, loss: bool
) -> None:
    result = once(openrlhf_runs.both_together, state)
    assert result["error"] is None
    assert len(result["windows"]) == 2
    for window in result["windows"]:
        tokens = [1] * 8 if loss else mean_of_means(window)
        arrives = [1] * 8 if optimizer else [1, 0, 0, 0, 0, 0, 0, 1]
        expected = [weight * kept for weight, kept in zip(tokens, arrives, strict=True)]
        assert window["coefficients"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert (window["relative_error"] < 1e-5) is (optimizer and loss)
