"""What looking ahead may cost: one all-reduce in a window, nothing that waits for the device, one window of data held.

Counted, not timed; benchmarks/loss_lookahead.py gives the times.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from trainfix.fixes import token_weighting
from trainfix.fixes.token_weighting import LookAhead
from trainfix.fixes.transformers.ahead import Training
from trainfix.fixes.transformers.label_smoothing import TokenSmoother

PROGRAM = "tests.fixes.transformers.costs"
STEPS = 4
CASES = {
    "8 micro-batches": {"steps": STEPS, "rows": 2 * STEPS},
    "24 micro-batches": {"steps": STEPS, "rows": 6 * STEPS},
}


@pytest.fixture
def without_values():
    """Tensors without values: whatever would wait for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
        with pytest.raises(DataDependentOutputException):
            int(torch.ones(3).sum())


def test_weighing_a_loss_does_not_wait_for_the_device(without_values):
    for own in (torch.ones((), dtype=torch.int64), 3, 0):
        training = Training.__new__(Training)
        training.own, training._factor = own, 8
        training._windows = SimpleNamespace(total=token_weighting.over_ranks(7))
        loss = torch.ones((), requires_grad=True)
        assert training.weigh(loss * 2).shape == ()
        assert training.weigh((loss * 2, "outputs"))[1] == "outputs"


def test_adding_up_over_ranks_does_not_wait_for_the_device(without_values):
    assert token_weighting.over_ranks(7).shape == ()


@pytest.mark.parametrize("tokens", ["a tensor", 3])
def test_smoothing_by_token_does_not_wait_for_the_device(without_values, tokens):
    logits, labels = torch.zeros(2, 5, 7, requires_grad=True), torch.zeros(2, 5, dtype=torch.int64)
    count = torch.ones((), dtype=torch.int64) if tokens == "a tensor" else tokens
    smoother = TokenSmoother(SimpleNamespace(ignore_index=-100, epsilon=0.1), count)
    smoother({"logits": logits}, labels, shift_labels=True).backward()


def test_no_more_than_one_window_of_micro_batches_is_held():
    held, total = [], []

    def add_up(tokens):
        total.append(tokens)
        return tokens

    ahead = LookAhead(STEPS, lambda batch: batch, add_up)
    for _ in ahead(range(3 * STEPS)):
        held.append(len(ahead._held) + 1)  # with the one that is handed out
    assert max(held) == STEPS
    assert total == [sum(range(first, first + STEPS)) for first in (0, 4, 8)]


@pytest.fixture
def counted(runs):
    """A function: release -> what two ranks counted without trainfix and with it, by case."""

    def both(version):
        packages = {"transformers": version}
        return [runs(packages, CASES, trainfix=trainfix, ranks=2, program=PROGRAM) for trainfix in (False, True)]

    return both


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.45.2"])
@pytest.mark.parametrize("name", CASES)
def test_there_is_one_more_all_reduce_in_each_window_and_nothing_else_between_the_ranks(counted, version, name):
    off, on = (results[name] for results in counted(version))
    assert [off["error"], on["error"]] == [None, None]
    windows = math.ceil(CASES[name]["rows"] / 2 / STEPS)
    more = {kind: on["collectives"].get(kind, 0) - off["collectives"].get(kind, 0) for kind in on["collectives"]}
    assert {kind: count for kind, count in more.items() if count} == {"all_reduce": windows}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_4_45_2_reads_at_most_a_window_ahead(counted, name):
    off, on = (results[name] for results in counted("4.45.2"))
    assert off["most_ahead"] <= 2  # accelerate's own loader is one ahead
    assert on["most_ahead"] <= STEPS + 1
