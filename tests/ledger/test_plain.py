"""Plain torch loops: right ones balance, and what goes wrong in a window is found and named."""

from __future__ import annotations

import pytest
import torch

from trainfix.ledger.book import Book
from trainfix.ledger.verdict import judge

STEPS = 4


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.body = torch.nn.Linear(16, 16)
        self.branch = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words, *, branch=True):
        hidden = torch.tanh(self.body(self.embedding(words)))
        return self.head(hidden + (self.branch(hidden) if branch else 0))


def listen(model, optimizer, judged):
    """A book of this model that is closed by this optimizer's steps."""
    book = Book(judged, pytest.fail)
    book.add(model)

    def stepping(one, *_):
        book.step(one)

    optimizer.register_step_pre_hook(stepping)
    return book


def loss_of(model, number, **uses):
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(50, (3, 9), generator=generator)
    scores = model(words[:, :-1], **uses)
    return torch.nn.functional.cross_entropy(scores.reshape(-1, 50), words[:, 1:].reshape(-1))


def audited(windows=3, *, fault=None, clip=None, dtype=torch.float32, uneven=False, branch=None, factor=1.0):
    """The findings of a loop. fault: called after each backward with (model, window, number); branch: the
    micro-batches that use it."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    findings = []
    listen(model, optimizer, findings.append)
    for window in range(windows):
        steps = STEPS - window % 2 if uneven else STEPS
        for number in range(steps):
            uses = {} if branch is None else {"branch": number in branch}
            (factor * loss_of(model, 10 * window + number, **uses) / steps).backward()
            if fault is not None:
                fault(model, window, number)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if fault is None or not getattr(fault, "keeps", False):
            optimizer.zero_grad()
    return findings


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 0.01},
        {"factor": 1024.0},
        {"uneven": True},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"branch": (1,)},
        {"branch": ()},
    ],
    ids=str,
)
def test_a_right_loop_balances(options):
    for found in audited(**options):
        assert found.balance.verdict == "balanced"
        assert found.outliers == {}


def test_what_is_dropped_in_the_middle_of_a_window_is_named():
    kept = {}

    def fault(model, window, number):
        for name, one in model.named_parameters():
            if number in (1, 2):
                one.grad.copy_(kept[name])
            kept[name] = one.grad.clone()

    for found in audited(fault=fault):
        assert found.balance.verdict == "unbalanced"
        assert found.balance.coefficients == pytest.approx([1, 0, 0, 1], abs=1e-3)


def test_a_window_that_was_not_cleared_is_found_in_the_next_one():
    def fault(model, window, number):
        pass

    fault.keeps = True
    first, second, _ = audited(fault=fault)
    assert first.balance.verdict == "balanced"
    assert second.balance.verdict == "unbalanced"
    assert second.balance.coefficients == pytest.approx([1] * STEPS, abs=1e-3)
    assert second.balance.earlier == pytest.approx([1] * STEPS, abs=1e-3)


def test_a_parameter_that_loses_its_window_is_named():
    def fault(model, window, number):
        if number == 2:
            model.branch.weight.grad.zero_()

    for found in audited(fault=fault):
        assert found.balance.verdict == "unbalanced"
        assert list(found.outliers) == ["branch.weight"]
        assert found.balance.coefficients == pytest.approx([0, 0, 0, 1], abs=1e-3)


def test_a_step_without_a_backward_has_nothing_to_balance():
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    findings = []
    listen(model, optimizer, findings.append)
    optimizer.step()
    assert findings == []


@pytest.mark.parametrize(("fault", "state"), [("none", "balanced"), ("dropped", "could not tell")])
def test_equal_micro_batches_balance_only_where_the_whole_sum_is_there(fault, state):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    findings = []
    listen(model, optimizer, findings.append)
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for number in range(STEPS):
        if fault == "dropped" and number == 2:
            optimizer.zero_grad()
        (model(inputs).square().mean() / STEPS).backward()
    optimizer.step()
    assert [judge(found).state for found in findings] == [state]


def test_sparse_gradients_balance():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 8, sparse=True), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    findings = []
    listen(model, optimizer, findings.append)
    for number in range(STEPS):
        words = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(number))
        (model(words).square().mean() / STEPS).backward()
    optimizer.step()
    assert [found.balance.verdict for found in findings] == ["balanced"]
