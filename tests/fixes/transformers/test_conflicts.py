"""What becomes of the repaired Trainer where Liger-Kernel, Unsloth or others change transformers as well.

Each child trains a small run first, after which its neighbour has changed Trainer; the runs that follow are judged.
"""

from __future__ import annotations

import pytest

from tests.support.stacks import ROOT, stack
from tests.support.trainer_runs import run

pytestmark = pytest.mark.slow

SHORT = {"steps": 2, "rows": 4}
LIGER = {"steps": 4, "prepare": "tests.support.neighbours:liger"}
PLAIN = {"steps": 4}
SMOOTHED = {"steps": 4, "arguments": {"label_smoothing_factor": 0.1}}
OVER_RANKS = {"steps": 4, "arguments": {"average_tokens_across_devices": True}}


def after(neighbour, *configurations):
    return [{**SHORT, "prepare": f"tests.support.neighbours:{neighbour}"}, *configurations]


def with_unsloth(**packages):
    return stack(unsloth="2026.10.9", unsloth_zoo="2026.10.9", peft="0.18.1", **packages)


def assert_right(result):
    assert result["error"] is None
    logged = [one["loss"] for one in result["logs"] if "loss" in one]
    assert len(logged) == len(result["windows"]) > 0
    for window, loss in zip(result["windows"], logged, strict=True):
        assert window["coefficients"] == pytest.approx([1] * len(window["tokens"]), abs=1e-3)
        assert window["relative_error"] < 1e-4
        assert loss == pytest.approx(window["exact_loss"], abs=1e-4)


def assert_means_over_ranks(result):
    """Two ranks with 158 and 68 tokens."""
    assert result["error"] is None
    for window in result["windows"]:
        assert window["coefficients"] == pytest.approx([113 / 158] * 4 + [113 / 68] * 4, abs=1e-3)


def reason(result, id):
    return next(one["reason"] for one in result["status"] if one["id"] == id)


def test_on_two_ranks_liger_kernels_loss_is_wrong_without_trainfix_and_right_with_it():
    """transformers 4.53.3, Liger-Kernel 0.5.10, TF-0402."""
    folders = [*stack(transformers="4.53.3", liger_kernel="0.5.10"), ROOT / "tests/support/triton_on_cpu"]
    (without,) = run(folders, [LIGER], trainfix=False, ranks=2)
    (repaired,) = run(folders, [LIGER], trainfix=True, ranks=2)
    assert_means_over_ranks(without)
    assert_right(repaired)


def test_unsloth_after_trainfix_undoes_the_repairs_and_a_run_that_needs_them_is_stopped():
    """transformers 4.52.4, two ranks: Unsloth writes get_batch_samples, training_step and compute_loss anew."""
    configurations = after(
        "unsloth", PLAIN, {**SMOOTHED, "arguments": {**SMOOTHED["arguments"], **OVER_RANKS["arguments"]}}, OVER_RANKS
    )
    _, plain, smoothed, over_ranks = run(
        with_unsloth(transformers="4.52.4", trl="0.19.1"), configurations, trainfix=True, ranks=2
    )
    assert "UnfixedBugError: TF-0402 is reached and not repaired" in plain["error"]
    assert "training_step has since been replaced by unsloth.models._utils." in plain["error"]
    assert "average_tokens_across_devices" in plain["error"]
    assert "compute_loss has since been replaced by unsloth.models._utils." in smoothed["error"]
    assert "unsloth.models._utils._unsloth_training_step" in reason(plain, "TF-0402")
    assert_right(over_ranks)  # the way out that the stop names


def test_unsloth_before_trainfix_is_not_patched_over_and_named():
    """transformers 4.52.4, two ranks."""
    configurations = after("unsloth_before_trainfix", PLAIN, OVER_RANKS)
    _, plain, over_ranks = run(
        with_unsloth(transformers="4.52.4", trl="0.19.1"),
        configurations,
        trainfix=False,
        ranks=2,
        env={"TRAINFIX": "on"},
    )
    assert_means_over_ranks(plain)  # nobody knows this code: said, not stopped
    assert "was replaced by unsloth.models._utils." in reason(plain, "TF-0402")
    assert next(one["state"] for one in plain["status"] if one["id"] == "TF-0402") == "refused"
    assert_right(over_ranks)


def test_unsloths_own_repair_of_the_accelerators_division_is_let_be():
    """transformers 5.5.3, TF-0404: Unsloth sets accelerate's steps to 1, and then none of its runs is stopped."""
    configurations = after("unsloth", PLAIN)
    _, plain = run(with_unsloth(transformers="5.5.3", trl="0.24.0"), configurations, trainfix=True)
    assert "unsloth.models._utils._unsloth_training_step" in reason(plain, "TF-0404")
    assert_right(plain)


def test_a_wrapper_that_says_what_it_wraps_does_not_stop_a_repaired_run_and_a_copy_does():
    """transformers 5.5.3, TF-0404."""
    wrapped, copied = (
        {**SHORT, "prepare": f"tests.support.neighbours:{name}_training_step"} for name in ("wrap", "replace")
    )
    _, with_wrapper, _, with_copy = run(stack(transformers="5.5.3"), [wrapped, PLAIN, copied, PLAIN], trainfix=True)
    assert_right(with_wrapper)
    assert "UnfixedBugError: TF-0404 is reached and not repaired" in with_copy["error"]
    assert "training_step has since been replaced by transformers.trainer.training_step" in with_copy["error"]
