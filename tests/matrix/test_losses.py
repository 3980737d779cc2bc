"""The table of the losses is complete and current, and the shapes of records and repairs are those of every release.

The runs themselves: `make matrix`, and tests/fixes for one release of each kind.
"""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from tests.matrix import losses, shapes
from tests.support.releases import cache_folder
from trainfix.advisories import RECORDS, Advisory
from trainfix.engine.decide import load_fix

KNOWN = shapes.known()
every_advisory = pytest.mark.parametrize("advisory", KNOWN, ids=lambda one: one.id)


def test_the_committed_table_has_every_row_and_no_complaint() -> None:
    rows = losses.load()
    assert list(rows) == list(losses.rows_wanted()), "run: make matrix"
    assert [f"{name}: {text}" for name, row in rows.items() for text in row["complaints"]] == []
    assert [name for name, row in rows.items() if row["wrong_after"]] == []


def test_the_committed_table_was_made_with_this_code() -> None:
    assert losses.stale(losses.load()) == [], "run: make matrix"


def test_every_affected_release_is_in_a_band_that_reaches_the_error() -> None:
    assert losses.not_covered() == []


def test_the_table_of_shapes_has_every_function_that_decides() -> None:
    table = shapes.load()
    listed = {package: sorted(set().union(*of_package.values())) for package, of_package in table.items()}
    assert listed == shapes.functions(), "run: python -m tests.matrix.shapes"


def test_the_table_of_shapes_agrees_with_what_is_installed() -> None:
    looked_at = 0
    for package, of_package in shapes.load().items():
        for release, found in of_package.items():
            folder = cache_folder() / f"{package}-{release}"
            if folder.is_dir():
                assert shapes.in_folder(folder, list(found)) == found, folder.name
                looked_at += 1
    assert looked_at


@every_advisory
def test_a_release_is_affected_by_shape_exactly_where_the_record_lists_it(advisory: Advisory) -> None:
    """A release whose wheel is not on the index any more is listed by its version alone."""
    releases = shapes.load()[advisory.package]
    assert set(advisory.affected) & set(releases)
    if not advisory.evidence:
        return
    wrong = [release for release, found in releases.items() if _kind(advisory, found) == "affected"]
    assert wrong == [release for release in releases if release in advisory.affected]


def _kind(advisory: Advisory, found: dict[str, str]) -> str | None:
    kinds = (known.get(found[path]) for path, known in advisory.evidence.items())
    return next((kind for kind in kinds if kind is not None), None)


@every_advisory
def test_the_evidence_names_every_shape_and_the_releases_that_have_it(advisory: Advisory) -> None:
    record = json.loads((RECORDS / f"{advisory.id}.json").read_text(encoding="utf-8"))
    evidence = record["database_specific"]["trainfix"]["evidence"]
    for path, classes in evidence.items():
        listed = {shape: text for shapes_of_class in classes.values() for shape, text in shapes_of_class.items()}
        released = _spans(shapes.load()[path.partition(".")[0]], path)
        assert {shape: released.get(shape) for shape in listed} == listed
        assert set(released) == set(listed) or len(evidence) > 1  # one function may leave it to the next


def _spans(releases: shapes.Shapes, path: str) -> dict[str, str]:
    """Shape -> the releases that have it, in words: ``4.46.2 to 4.46.3, 4.47.1``."""
    spans: dict[str, list[str]] = {}
    for shape, group in groupby(releases, key=lambda release: releases[release][path]):
        band = list(group)
        spans.setdefault(shape, []).append(band[0] if len(band) == 1 else f"{band[0]} to {band[-1]}")
    return {shape: ", ".join(of_shape) for shape, of_shape in spans.items()}


@every_advisory
def test_the_repair_knows_its_functions_in_every_affected_release(advisory: Advisory) -> None:
    if advisory.fix is None:
        return
    fix, releases = load_fix(advisory.fix), shapes.load()[advisory.package]
    refused = [
        f"{target.path} on {release}: {releases[release][target.path]}"
        for release in advisory.affected
        if release in releases
        for target in fix.targets + fix.relies_on
        if target.module.partition(".")[0] == advisory.package and releases[release][target.path] not in target.shapes
    ]
    assert refused == []


def test_no_function_of_a_repair_has_a_shape_that_no_release_has() -> None:
    table = shapes.load()
    strangers = []
    for _, group in groupby(
        sorted((one for one in KNOWN if one.fix), key=lambda one: str(one.fix)), lambda one: one.fix
    ):
        fix = load_fix(str(next(group).fix))
        for target in fix.targets + fix.relies_on:
            released = {found[target.path] for found in table[target.path.partition(".")[0]].values()}
            strangers += [f"{fix.name}: {target.path} {shape}" for shape in target.shapes - released]
    assert strangers == []
