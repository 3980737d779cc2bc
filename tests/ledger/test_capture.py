"""What each backward contributes, seen from outside and without a trace in the training."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trainfix.ledger.capture import Capture, Leaf, finite, stacked
from trainfix.ledger.sample import LEAST, TOTAL, draw


class Network(torch.nn.Module):
    """Two layers with a shared weight, a bias that is frozen, and a branch that not every batch uses."""

    def __init__(self, *, reentrant=None):
        super().__init__()
        self.first, self.second = torch.nn.Linear(20, 20), torch.nn.Linear(20, 20)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.branch = torch.nn.Linear(20, 20)
        self.reentrant = reentrant

    def forward(self, inputs, *, branch=False):
        def body(hidden):
            return torch.tanh(self.second(torch.tanh(self.first(hidden))))

        hidden = body(inputs) if self.reentrant is None else checkpoint(body, inputs, use_reentrant=self.reentrant)
        return (self.branch(hidden) if branch else hidden).square().mean()


def watched(model):
    parameters = dict(model.named_parameters())
    sample = draw({name: parameter.numel() for name, parameter in parameters.items()})
    capture = Capture(failed)
    capture.watch({name: Leaf(one) for name, one in parameters.items() if one.requires_grad}, sample)
    return capture, sample, parameters


def failed(error):
    raise error


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 20, generator=generator, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_every_backwards_own_contribution_is_seen_before_it_is_accumulated(reentrant):
    torch.manual_seed(0)
    model = Network(reentrant=reentrant)
    capture, sample, parameters = watched(model)
    capture.attach()
    alone = []
    for number, batch in enumerate(batches()):
        uses = {"branch": number == 1}
        before = {name: None if one.grad is None else one.grad.clone() for name, one in parameters.items()}
        model(batch, **uses).backward()
        alone.append(
            {
                name: one.grad - (0 if before[name] is None else before[name])
                for name, one in parameters.items()
                if one.grad is not None
            }
        )
    rows = stacked(capture.since(0), sample)
    numbers = torch.arange(len(sample)).repeat_interleave(torch.tensor([len(one) for one in sample.values()]))
    assert rows.shape == (3, sum(map(len, sample.values())))
    for row, own in zip(rows, alone, strict=True):
        for number, (name, places) in enumerate(sample.items()):
            wanted = own[name].reshape(-1)[places] if name in own else torch.zeros(len(places))
            torch.testing.assert_close(row[numbers == number].float(), wanted, rtol=1e-4, atol=1e-7)


def test_training_is_the_same_to_the_bit_with_and_without_it():
    ends = []
    for listening in (False, True):
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        capture, _, _ = watched(model)
        if listening:
            capture.attach()
        for _ in range(5):
            for batch in batches():
                model(batch, branch=True).backward()
            optimizer.step()
            optimizer.zero_grad()
            capture.forget(capture.count)
        ends.append(torch.cat([one.detach().reshape(-1) for one in model.parameters()]))
    assert torch.equal(*ends)


def test_nothing_is_left_behind_when_it_is_taken_off():
    model = Network()
    capture, _, parameters = watched(model)
    capture.attach()
    capture.clear()
    assert not any(one._backward_hooks for one in parameters.values())
    model(batches()[0]).backward()
    assert capture.count == 0


def test_a_backward_that_fails_does_not_swallow_the_next_one():
    model = Network()
    capture, _, _ = watched(model)
    capture.attach()
    trouble = model.first.weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batches()[0], branch=True).backward()
    trouble.remove()
    capture.forget(capture.count)
    model(batches()[1]).backward()
    assert len(capture.since(1)) == 1


@pytest.mark.parametrize("large", [False, True])
def test_a_gradient_that_is_not_finite_shows_although_it_is_not_in_the_sample(large):
    model = torch.nn.Linear(300, 400 if large else 100)
    capture, sample, _ = watched(model)
    capture.attach()
    rows = {int(place) // 300 for place in sample["weight"]}
    row = next(iter(set(range(len(model.weight))) - rows), 7)
    for fault in (False, True):
        out = model(torch.ones(1, 300))
        factor = torch.ones_like(out)
        factor[0, row] = float("inf") if fault else 1.0
        (out * factor).sum().backward()
    assert finite(capture.since(0)) == [True, False]


def test_an_error_of_ours_does_not_reach_the_training():
    model, errors = Network(), []
    capture = Capture(errors.append)
    capture.watch({"first.weight": Leaf(model.first.weight)}, {"first.weight": torch.tensor([10**9])})
    capture.attach()
    model(batches()[0]).backward()
    assert model.first.weight.grad is not None
    assert [type(error) for error in errors] == [IndexError]


def test_what_a_long_window_brings_is_kept_up_to_a_limit(monkeypatch):
    model = Network()
    capture, sample, _ = watched(model)
    capture.attach()
    monkeypatch.setattr("trainfix.ledger.capture.LARGEST", 3 * 4 * sum(map(len, sample.values())))
    for number in range(10):
        model(batches()[number % 3], branch=True).backward()
    assert capture.full
    assert sum(bool(row.samples) for row in capture.since(0)) < 5
    capture.forget(capture.count)
    assert not capture.full


def test_a_few_coordinates_of_every_parameter_and_a_few_thousand_of_all():
    sizes = {"embedding": 10**6, "small": 3, "empty": 0, "bias": 64, "matrix": 4096}
    sample = draw(sizes)
    assert {name: len(places) for name, places in sample.items() if sizes[name] <= LEAST} == {"small": 3, "empty": 0}
    assert all(len(places) >= LEAST for name, places in sample.items() if sizes[name] >= LEAST)
    assert sum(map(len, sample.values())) <= TOTAL
    for name, places in sample.items():
        assert len(set(places.tolist())) == len(places)
        assert not len(places) or (int(places.min()) >= 0 and int(places.max()) < sizes[name])
        assert torch.equal(places, draw(sizes)[name])


def test_many_parameters_still_have_some_each():
    sample = draw({f"expert {number}": 100 for number in range(2000)})
    assert {len(places) for places in sample.values()} == {LEAST}
