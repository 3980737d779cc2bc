"""A bucket's table: every element has one owner, and what is called aligned is."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfix.gradcopy.kernels.table import BODY_BLOCK, DESTINATION_VECTOR, REST_BLOCK, Span, table


@st.composite
def buckets(draw):
    """Spans on a few bases. Those of one destination base lie in any distance behind each other."""
    vectors = {base: draw(st.sampled_from([1, 4, 8])) for base in range(3)}  # one dtype for each gradient base
    ends = {base: draw(st.integers(0, 9)) for base in range(2)}
    spans = []
    for _ in range(draw(st.integers(0, 8))):
        gradient_base, destination_base = draw(st.sampled_from(sorted(vectors))), draw(st.sampled_from(sorted(ends)))
        begin = ends[destination_base] + draw(st.integers(0, 9))
        elements = draw(st.one_of(st.integers(0, 40), st.integers(0, 3 * BODY_BLOCK)))
        ends[destination_base] = begin + elements
        gradient, turned = draw(st.integers(0, 99)), draw(st.booleans())
        vector = vectors[gradient_base]
        spans.append(Span(gradient_base, destination_base, gradient, begin, elements, vector, turned))
    return draw(st.permutations(spans))


class Row(NamedTuple):
    gradient: int
    destination: int
    elements: int
    square: int


def rows(made):
    return [(launch, Row(*flat[at : at + 4])) for launch, flat in made.rows.items() for at in range(0, len(flat), 4)]


@given(buckets())
def test_every_element_has_one_owner_which_adds_the_right_gradient_in_the_right_way(spans):
    wanted = sorted(
        (span.destination_base, span.destination + at, span.gradient_base, span.gradient + at, span.turned)
        for span in spans
        for at in range(span.elements)
    )
    owned = sorted(
        (launch.destination_base, row.destination + at, launch.gradient_base, row.gradient + at, launch.turned)
        for launch, row in rows(table(spans))
        for at in range(row.elements)
    )
    assert owned == wanted


@given(buckets())
def test_an_aligned_row_begins_and_ends_at_16_bytes_on_both_sides(spans):
    for launch, row in rows(table(spans)):
        if launch.vector > 1:
            assert row.gradient % launch.vector == 0
            assert row.elements % launch.vector == 0
            assert row.destination % DESTINATION_VECTOR == 0


@given(buckets())
def test_no_row_is_empty_or_longer_than_its_block(spans):
    for launch, row in rows(table(spans)):
        assert 0 < row.elements <= (BODY_BLOCK if launch.vector > 1 else REST_BLOCK)


@given(buckets())
def test_squares_are_numbered_span_after_span_and_in_each_from_its_first_element(spans):
    made = table(spans)
    in_order = sorted(rows(made), key=lambda found: found[1].square)
    assert [row.square for _, row in in_order] == [*range(sum(made.parts))]
    assert len(made.parts) == len(spans)
    for span, parts in zip(spans, made.parts, strict=True):
        mine, in_order = in_order[:parts], in_order[parts:]
        at = span.destination
        for launch, row in mine:
            assert (launch.destination_base, row.destination) == (span.destination_base, at)
            at += row.elements
        assert at == span.destination + span.elements


@given(buckets())
def test_the_parts_do_not_depend_on_what_is_first(spans):
    turned = [span._replace(turned=not span.turned) for span in spans[:1]] + list(spans[1:])
    assert table(turned).parts == table(spans).parts


def test_a_pair_of_memories_takes_two_launches_and_two_more_where_it_is_mixed():
    spans = [Span(0, 0, 100 * number, 100 * number, 99, 8, number % 2 == 1) for number in range(8)]
    assert len(table(spans[::2]).rows) == 2
    assert len(table(spans).rows) == 4


def test_nothing_that_can_be_aligned_is_left_to_the_rest():
    """Both sides begin three elements before a multiple of 16 bytes."""
    found = rows(table([Span(0, 0, 5, 13, 8003, 8, False)]))
    assert [(launch.vector, row.elements) for launch, row in found] == [(1, 3), (8, 4096), (8, 3904)]


def test_no_spans_are_no_launches():
    assert table([]) == ({}, [])


@pytest.mark.parametrize("begin", [0, 9])
def test_two_spans_on_the_same_elements_are_an_error(begin):
    first, second = Span(0, 0, 0, 0, 10, 8, False), Span(1, 0, 0, begin, 1, 8, False)
    with pytest.raises(ValueError, match="two gradients of one bucket go to the same elements of a master gradient"):
        table([second, first])
