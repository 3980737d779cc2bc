"""Whether a window's tokens count the same: told from the weights of sampled positions alone."""

from __future__ import annotations

import pytest
import torch

from trainfix.measure.evenness import Positions, evenness

COUNTS = (2, 9, 5, 30)


def window(weights, *, residual=0.0, **columns):
    """One trained position per weight; weights: for each micro-batch, one list per sequence."""
    rows = [
        (batch, sequence, weight)
        for batch, sequences in enumerate(weights)
        for sequence, own in enumerate(sequences)
        for weight in own
    ]
    batch, sequence, each = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    trained = torch.tensor([float(sum(map(len, weights[int(one)]))) for one in batch], dtype=torch.float64)
    full = {name: torch.full_like(each, value) for name, value in {"shares": 0.0, "losses": 4.0}.items()}
    full |= dict.fromkeys(("own", "later", "before"), torch.ones_like(each))
    full |= dict.fromkeys(("residuals", "left_over"), torch.full_like(each, residual))
    given = {name: torch.as_tensor(value, dtype=torch.float64).expand_as(each) for name, value in columns.items()}
    start = {"batch": batch, "passes": batch, "sequence": sequence, "weights": each, "smoothed": each}
    return Positions(**{**start, "trained": trained, **full, **given})


def even(value=1 / 46):
    return [[[value] * count] for count in COUNTS]


@pytest.mark.parametrize("value", [1 / 46, 1.0, 1e-6])
def test_equal_weights_are_even_at_any_size_and_add_up(value):
    found = evenness(window(even(value)))
    assert found.verdict == "even"
    assert list(found.weights.values()) == pytest.approx([1] * 4)
    assert list(found.tokens.values()) == list(COUNTS)
    assert sum(found.sums.values()) == pytest.approx(46 * value)


def test_a_mean_of_means_is_uneven_by_micro_batch_to_the_digit():
    found = evenness(window([[[1 / count / 4] * count] for count in COUNTS]))
    assert found.verdict == "uneven"
    assert list(found.weights.values()) == pytest.approx([46 / 4 / count for count in COUNTS])
    assert sum(found.sums.values()) == pytest.approx(1)
    assert found.within == {}


def test_a_mean_of_the_sequences_means_is_uneven_inside_micro_batches():
    found = evenness(window([[[1 / 3] * 3, [1 / 6] * 6], [[1 / 2] * 2, [1 / 8] * 8]]))
    assert found.verdict == "uneven"
    assert found.within[0][0] / found.within[0][1] == pytest.approx(2)


def test_one_token_that_counts_twice_is_uneven():
    weights = even()
    weights[1][0][3] *= 2
    found = evenness(window(weights))
    assert (found.verdict, list(found.within)) == ("uneven", [1])


def test_weights_that_vary_freely_are_a_weighted_loss():
    draw = torch.rand(46, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    weights = [[[1 + draw.pop() for _ in range(count)]] for count in COUNTS]
    assert evenness(window(weights)).verdict == "token by token"


def test_a_weighted_loss_that_is_averaged_micro_batch_by_micro_batch_is_uneven():
    draw = torch.rand(46, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    weights = [[[(1 + 0.2 * draw.pop()) / count for _ in range(count)]] for count in COUNTS]
    assert evenness(window(weights)).verdict == "uneven"


@pytest.mark.parametrize("other", [1.0, -0.5])
def test_negative_weights_are_a_preference(other):
    assert evenness(window([[[other] * 4, [-1.0] * 4]])).verdict == "negative"


def test_what_no_weight_explains_is_not_plain():
    assert evenness(window(even(), residual=0.4)).verdict == "not plain"


def test_noise_of_16_bits_is_even_and_moves_the_limit():
    generator = torch.Generator().manual_seed(0)
    weights = [[(0.1 * (1 + 0.008 * torch.randn(count, generator=generator))).tolist()] for count in (20, 30, 40, 50)]
    found = evenness(window(weights, residual=0.01))
    assert (found.verdict, found.noise) == ("even", pytest.approx(0.01))


def test_label_smoothing_is_recognised_only_where_it_explains_more():
    smoothed = torch.full((46,), 1 / 46, dtype=torch.float64)
    some = {"residual": 0.05, "smoothed": smoothed, "shares": 0.1, "left_over": 1e-7}
    found = evenness(window([[[w * 1.1 for w in own[0]]] for own in even()], **some))
    assert (found.verdict, found.smoothing) == ("even", pytest.approx(0.1))
    assert sum(found.sums.values()) == pytest.approx(1)


@pytest.mark.parametrize("where", ["own", "later", "before"])
def test_labels_that_are_shifted_are_named_and_a_coincidence_is_not(where):
    found = evenness(window(even(), residual=0.8, **{where: 1e-6}))
    assert (found.shifted, found.moved) == (where, 46)
    once = torch.ones(46, dtype=torch.float64)
    once[3] = 1e-6
    assert evenness(window(even(), residual=0.8, **{where: once})).shifted == ""


def test_positions_without_weight_are_not_trained():
    found = evenness(window([[[0.0] * 5 + [0.1] * 5], [[0.0] * 5]]))
    assert (found.verdict, found.positions, list(found.tokens)) == ("even", 5, [0])
    assert evenness(window([[[0.0] * 5]])).verdict == "nothing"
