"""Micro-batch coefficients split into the weight of each token and a common scale."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfix.measure.token_weights import token_weights


def test_a_mean_of_means_gives_the_tokens_of_short_answers_more_weight() -> None:
    tokens = [2, 61, 91, 61]
    mean_of_means = [sum(tokens) / len(tokens) / count for count in tokens]
    found = token_weights(mean_of_means, tokens)
    assert found.scale == pytest.approx(1)
    assert found.weights == pytest.approx([26.875, 0.8811, 0.5907, 0.8811], abs=1e-4)


def test_a_gradient_that_is_divided_twice_has_right_weights_and_a_wrong_scale() -> None:
    found = token_weights([0.125] * 3, [2, 3, 61])
    assert found.scale == pytest.approx(0.125)
    assert found.weights == pytest.approx([1, 1, 1])


def test_a_micro_batch_without_trained_tokens_has_no_token_to_weigh() -> None:
    found = token_weights([1.0, 7.0], [5, 0])
    assert found.scale == 1
    assert found.weights[0] == 1
    assert math.isnan(found.weights[1])


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 500)), min_size=1).filter(lambda x: sum(n for _, n in x))
)
def test_the_mean_weight_over_all_tokens_is_one(pairs: list[tuple[float, int]]) -> None:
    coefficients, tokens = [c for c, _ in pairs], [n for _, n in pairs]
    found = token_weights(coefficients, tokens)
    weighed = [(w, n) for w, n in zip(found.weights, tokens, strict=True) if n]
    assert sum(w * n for w, n in weighed) / sum(tokens) == pytest.approx(1)


@pytest.mark.parametrize(
    ("coefficients", "tokens", "words"),
    [([1.0], [1, 2], "1 coefficients and 2 token counts"), ([1.0], [-1], "negative"), ([1.0, 1.0], [0, 0], "zero")],
)
def test_what_makes_no_sense_is_refused(coefficients: list[float], tokens: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token_weights(coefficients, tokens)
