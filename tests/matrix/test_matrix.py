"""Releases of DeepSpeed, really run, without and with trainfix. All of them: `make matrix`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import matrix
from tests.matrix.render import rendered
from tests.support.releases import RELEASES


@pytest.mark.slow
@pytest.mark.parametrize("version", RELEASES)
def test_doctor_judges_the_release_as_its_advisories_list_it(version: str) -> None:
    affected = {id for id, verdict in matrix.doctor(version).items() if verdict == "affected"}
    assert affected == matrix.affected(version)


CHOSEN = matrix.representatives()


@pytest.mark.slow
@pytest.mark.parametrize("version", CHOSEN)
def test_wrong_before_where_affected_right_after_and_identical_elsewhere(version: str) -> None:
    row = matrix.run(version, CHOSEN[version])
    assert row["complaints"] == []
    assert row["wrong_after"] == []


def test_every_repaired_error_is_reached_by_a_case_on_one_rank_or_two() -> None:
    assert {id for case in matrix.CASES for id in case.reaches} == matrix.repaired()


def test_the_committed_table_has_every_release_and_no_complaint() -> None:
    rows = matrix.load()
    assert list(rows) == list(RELEASES)
    assert [text for row in rows.values() for text in row["complaints"]] == []


def test_the_pages_made_from_the_table_are_current() -> None:
    for file, text in rendered().items():
        assert Path(file).read_text() == text, "run: python -m tests.matrix --render"
