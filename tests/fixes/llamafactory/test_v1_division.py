"""TF-0204: the v1 trainer of LLaMA-Factory 0.9.5 under DeepSpeed gets 1/n of the gradient."""

from __future__ import annotations

import pytest

from tests.fixes.transformers.judging import assert_right, states, windows
from tests.support import llamafactory_runs, llamafactory_v1_runs

pytestmark = pytest.mark.slow

TABLE = [{"steps": 4, "rows": 8, "deepspeed": {"stage": 1}}, {"steps": 1, "rows": 8, "deepspeed": {"stage": 1}}]


def runs(trainfix):
    return llamafactory_v1_runs.run(llamafactory_runs.stack("0.9.5", deepspeed="0.18.4"), TABLE, trainfix=trainfix)


def test_the_v1_trainer_under_deepspeed_gets_a_quarter_of_the_gradient_with_4_micro_batches_and_all_with_trainfix():
    (quarter, alone), (repaired, still_alone) = runs(False), runs(True)
    for window, shown in zip(windows(quarter), quarter["logs"], strict=True):
        assert window["coefficients"] == pytest.approx([0.25] * 4, abs=1e-3)
        assert shown["loss"] == pytest.approx(window["exact_loss"], abs=1e-4)  # looks right
        assert shown["grad_norm"] == pytest.approx(window["exact_norm"] / 4, rel=1e-3)
    assert_right(repaired)
    assert states(repaired)["TF-0204"] == "applied"
    assert_right(alone)
    assert still_alone["windows"] == alone["windows"]
