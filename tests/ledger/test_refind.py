"""The catalogue's errors, found again: a few of them here, all of them in docs/ledger.json by `make ledger`."""

from __future__ import annotations

import json

import pytest

from tests.ledger import refind

WANTED = {f"TF-{number:04}" for number in (1, 2, 3, 4, 5, 6, 8, 9, 101, 102, 103, 201, 202, 203, 301)}
WANTED |= {f"TF-{number:04}" for number in (401, 402, 403, 404, 405, 406, 501, 601)}
TABLE = json.loads(refind.TABLE.read_text())


def test_the_table_has_every_error_that_was_to_be_found_again_and_all_were():
    assert {case.id for case in refind.CASES} == WANTED
    assert [(row["id"], row["packages"], row["ranks"]) for row in TABLE] == [
        (case.id, dict(case.packages), case.ranks) for case in refind.CASES
    ]
    assert [row for row in TABLE if not row["as_wanted"]] == []


def test_the_page_shows_the_tables():
    assert refind.rendered() in refind.PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("id", ["TF-0002", "TF-0009", "TF-0404", "TF-0601"])
def test_it_is_found_again_without_being_told_and_its_repaired_self_balances(id):
    for case in refind.CASES:
        if case.id == id:
            row = refind.run(case)
            assert row["as_wanted"], row
