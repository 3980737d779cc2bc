"""The arithmetic that the loss repairs share: looking ahead over a window, counting, and what a backend divides by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainfix.fixes.token_weighting import BACKENDS, LookAhead, over_ranks, trained


def epochs_of(look: LookAhead, epochs: list[list[int]]) -> list[list[tuple[int, int]]]:
    """What each epoch hands out: the micro-batch, and the total that is known by then."""
    return [[(batch, look.total) for batch in look(iter(epoch))] for epoch in epochs]


def test_the_total_of_a_window_is_known_before_its_first_micro_batch() -> None:
    look = LookAhead(3, count=lambda batch: batch, add_up=lambda tokens: tokens)
    assert epochs_of(look, [[1, 2, 3, 4, 5, 6]]) == [[(1, 6), (2, 6), (3, 6), (4, 15), (5, 15), (6, 15)]]


def test_a_window_that_spans_epochs_waits_for_the_next_one_and_the_last_incomplete_one_is_left_out() -> None:
    look = LookAhead(2, count=lambda batch: batch, add_up=lambda tokens: tokens)
    assert epochs_of(look, [[1, 2, 3], [4, 5, 6], [7]]) == [[(1, 3), (2, 3)], [(3, 7), (4, 7), (5, 11), (6, 11)], []]


def test_a_window_that_the_engine_is_in_the_middle_of_is_finished_first() -> None:
    look = LookAhead(3, count=lambda batch: batch, add_up=lambda tokens: tokens, first=1)
    assert epochs_of(look, [[1, 2, 3, 4]]) == [[(1, 1), (2, 9), (3, 9), (4, 9)]]


@given(st.integers(1, 5), st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=5))
def test_nothing_is_lost_repeated_or_reordered_and_at_most_a_window_is_held(
    length: int, epochs: list[list[int]]
) -> None:
    made, sums = 0, list[int]()

    def source(epoch: list[int]) -> Iterator[int]:
        nonlocal made
        for batch in epoch:
            made += 1
            yield batch

    def add_up(tokens: int) -> int:
        sums.append(tokens)
        return tokens

    look, handed = LookAhead(length, count=lambda batch: batch, add_up=add_up), list[int]()
    for epoch in epochs:
        for batch in look(source(epoch)):
            handed.append(batch)
            assert made - len(handed) < length
    every = [batch for epoch in epochs for batch in epoch]
    complete = len(every) // length * length
    assert handed == every[:complete]
    assert sums == [sum(every[begin : begin + length]) for begin in range(0, complete, length)]


def test_the_first_label_of_a_row_is_never_predicted() -> None:
    assert trained(torch.tensor([[5, 6, -100, 7], [-100, -100, -100, -100]])) == 2
    assert trained(torch.tensor([[5]])) == 0


def test_without_a_group_the_count_is_its_own_sum() -> None:
    total = over_ranks(16_777_217)
    assert total.dtype == torch.int64
    assert total.shape == ()
    assert int(total) == 16_777_217  # one more than float32 can count to


@pytest.mark.parametrize(
    ("backend", "factor"),
    [
        ("deepspeed", 8),
        ("deepspeed, scale_wrt_gas=False", 2),
        ("accelerate", 8),
        ("accelerate, one step", 2),
        ("sum", 1),
    ],
)
def test_the_factor_undoes_what_the_backend_divides_by(backend: str, factor: int) -> None:
    assert BACKENDS[backend].factor(steps=4, ranks=2) == factor
