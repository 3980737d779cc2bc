"""The weight of each token, seen from the gradient at the hidden state alone."""

from __future__ import annotations

import pytest
import torch

from trainfix.measure.next_token import Output, directions, fit, misfit, towards

POSITIONS, HIDDEN, VOCABULARY = 12, 16, 40
WEIGHTS = torch.tensor([0, 0, 0, 1, 1, 1, 0.25, 0.25, 2, -1, 1e-4, 0], dtype=torch.float64)


def positions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    matrix = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    return hidden, matrix, bias, targets


def gradient_of(hidden, output, loss):
    """What autograd sends back to the hidden state for a loss of the logits."""
    leaf = hidden.clone().requires_grad_()
    logits = leaf @ output.matrix.to(hidden.dtype).T
    if output.bias is not None:
        logits = logits + output.bias.to(hidden.dtype)
    logits = logits * output.scale
    if output.cap is not None:
        logits = output.cap * torch.tanh(logits / output.cap)
    loss(logits).backward()
    return leaf.grad


def weighted(targets):
    def loss(logits):
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (each * WEIGHTS.to(each.dtype)).sum()

    return loss


def outputs():
    _, matrix, bias, _ = positions()
    return {
        "plain": Output(matrix),
        "bias": Output(matrix, bias),
        "scaled": Output(matrix, scale=1 / 13),
        "capped": Output(matrix, cap=5.0),
        "all": Output(matrix, bias, 0.25, 3.0),
    }


@pytest.mark.parametrize("name", outputs())
def test_every_tokens_weight_comes_back_to_the_digit(name):
    hidden, _, _, targets = positions()
    output = outputs()[name]
    found = fit(gradient_of(hidden, output, weighted(targets)), directions(hidden, output, targets))
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=1e-9, atol=1e-12)
    assert float(found.residuals.max()) < 1e-9


def test_a_gradient_in_float32_gives_the_weights_to_a_millionth():
    hidden, matrix, _, targets = positions()
    output = Output(matrix)
    gradient = gradient_of(hidden.float(), output, weighted(targets))
    found = fit(gradient, directions(hidden.float(), output, targets))
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1),
        lambda logits, targets: (
            torch.nn.functional.cross_entropy(logits, targets) + 0.1 * logits.logsumexp(-1).square().mean()
        ),
    ],
    ids=["label smoothing", "z-loss"],
)
def test_another_loss_leaves_something_over(loss):
    hidden, matrix, _, targets = positions()
    gradient = gradient_of(hidden, Output(matrix), lambda logits: loss(logits, targets))
    assert float(fit(gradient, directions(hidden, Output(matrix), targets)).residuals.min()) > 1e-3


def test_labels_that_are_shifted_fit_the_token_they_were_shifted_to():
    hidden, matrix, _, targets = positions()
    shifted = targets.roll(-1)
    gradient = gradient_of(hidden, Output(matrix), lambda logits: torch.nn.functional.cross_entropy(logits, shifted))
    found = directions(hidden, Output(matrix), targets)
    assert float(fit(gradient, found).residuals.min()) > 1e-2
    assert float(fit(gradient, directions(hidden, Output(matrix), shifted)).residuals.max()) < 1e-9
    (moved,) = towards(found, hidden, Output(matrix), targets, [shifted])
    assert float(fit(gradient, moved).residuals.max()) < 1e-9
    assert float(misfit(gradient, moved).max()) < 1e-9


@pytest.mark.parametrize("name", outputs())
def test_label_smoothing_is_recognised_and_its_share_recovered(name):
    hidden, _, _, targets = positions()
    output = outputs()[name]

    def loss(logits):
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
        return (each * WEIGHTS).sum()

    found = fit(gradient_of(hidden, output, loss), directions(hidden, output, targets))
    torch.testing.assert_close(found.smoothed, WEIGHTS, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.shares[WEIGHTS != 0], torch.full((8,), 0.1, dtype=torch.float64))
    assert float(found.left_over.max()) < 1e-9


@pytest.mark.parametrize("name", outputs())
def test_a_large_vocabulary_is_gone_through_in_pieces_with_the_same_result(name, monkeypatch):
    hidden, _, _, targets = positions()
    whole = directions(hidden, outputs()[name], targets)
    monkeypatch.setattr("trainfix.measure.next_token._ELEMENTS", 7 * HIDDEN)
    pieces = directions(hidden, outputs()[name], targets)
    for one, other in zip(vars(whole).values(), vars(pieces).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_losses_are_the_cross_entropies():
    hidden, matrix, bias, targets = positions()
    wanted = torch.nn.functional.cross_entropy(hidden @ matrix.T + bias, targets, reduction="none")
    found = directions(hidden, Output(matrix, bias), targets)
    torch.testing.assert_close(found.losses, wanted)
    (moved,) = towards(found, hidden, Output(matrix, bias), targets, [targets.roll(-1)])
    again = directions(hidden, Output(matrix, bias), targets.roll(-1))
    torch.testing.assert_close(moved.losses, again.losses)


def test_a_position_without_gradient_has_no_weight_and_nothing_left_over():
    hidden, matrix, _, targets = positions()
    found = fit(torch.zeros_like(hidden), directions(hidden, Output(matrix), targets))
    assert not found.weights.any()
    assert not found.residuals.any()


def test_shapes_that_do_not_fit_are_named():
    hidden, matrix, _, targets = positions()
    found = directions(hidden, Output(matrix), targets)
    with pytest.raises(ValueError, match=r"\[12, 16\] as the directions, not \[11, 16\]"):
        fit(hidden[1:], found)
    with pytest.raises(ValueError, match=r"not \[12, 16\] and \[11\]"):
        directions(hidden, Output(matrix), targets[1:])
    with pytest.raises(ValueError, match=r"must be \[vocabulary, 16\], not \[40, 15\]"):
        directions(hidden, Output(matrix[:, 1:]), targets)
