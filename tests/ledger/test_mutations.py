"""The mutation suite: its tables, the result that is written down, and a part of it run again.

The whole is ``python -m tests.ledger.mutations --json docs/ledger-mutations.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.ledger.mutations import runs
from tests.ledger.mutations.__main__ import audit
from tests.ledger.mutations.edits import BrokenEditError, Edit, Edited, rewritten
from tests.ledger.mutations.faults import BEYOND, FAMILIES, FAULTS
from tests.ledger.mutations.healthy import ACCUSED, BY_NAME, HEALTHY

TABLE = Path(__file__).resolve().parents[2] / "docs" / "ledger-mutations.json"

AGAIN = (
    "the Trainer zeroes gradients before every micro-batch",
    "accelerate goes back twice",
    "a buffer is not emptied after the step",
    "a partial window is divided like a whole one",
    "DDP stays unsynchronized after its first no_sync",
    "only matrices are clipped",
    "the mean over a micro-batch, divided by the micro-batches",
    "padding is trained",
    "labels are not shifted by the loss",
)
HEALTHY_AGAIN = (
    "clipping",
    "loss scale",
    "packed documents",
    "policy gradient",
    "two models against each other",
    "Trainer, checkpointing",
    "DDP, no_sync",
)


def test_there_are_enough_faults_of_every_family_and_most_are_edits_of_frameworks():
    families = Counter(fault.family for fault in FAULTS)
    assert len(FAULTS) >= 44
    assert set(families) == set(FAMILIES)
    assert max(families.values()) * 4 <= len(FAULTS)
    assert sum(fault.in_framework for fault in FAULTS) >= 28
    assert sum(fault.frozen for fault in FAULTS) == 10


def test_there_are_enough_healthy_runs_on_one_and_on_two_ranks():
    assert len(HEALTHY) >= 22
    assert {run.ranks for run in HEALTHY} == {1, 2}


def test_names_are_given_once_and_every_fault_has_its_healthy_run():
    names = [one.name for one in (*FAULTS, *BEYOND, *HEALTHY, *ACCUSED)]
    assert sorted(names) == sorted(set(names))
    assert all(fault.run in BY_NAME for fault in (*FAULTS, *BEYOND))
    changes = [fault.edits for fault in (*FAULTS, *BEYOND)]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize(("text", "found"), [("a = 2", 0), ("a = 1; a = 1", 2)], ids=["nowhere", "twice"])
def test_an_edit_that_does_not_fit_says_how_often_its_text_is_there(text, found):
    with pytest.raises(BrokenEditError, match=f"module: {found} places, not one, read 'a = 1'"):
        rewritten(text, [Edit("module", "a = 1", "a = 3")])


def test_an_edit_that_comes_too_late_or_is_never_reached_is_told():
    with pytest.raises(BrokenEditError, match="imported before it could be edited: json"):
        Edited([Edit("json", "", "")])
    with pytest.raises(BrokenEditError, match="never imported: nowhere"):
        Edited([Edit("nowhere", "", "")]).check()


def test_what_is_written_down_is_of_these_faults_and_these_runs():
    table = json.loads(TABLE.read_text())
    assert [row["fault"] for row in table["faults"]] == [fault.name for fault in FAULTS]
    assert [row["run"] for row in table["healthy"]] == [run.name for run in HEALTHY]
    assert not [row for row in (*table["faults"], *table["healthy"]) if row["broken"]]


def test_at_least_95_percent_were_found_within_two_windows_and_no_healthy_run_was_accused():
    table = json.loads(TABLE.read_text())
    found = [row for row in table["faults"] if row["found"]]
    assert len(found) >= 0.95 * len(FAULTS)
    assert all(row["after"] in (1, 2) and row["said"] for row in found)
    assert all(row["why_not"] for row in table["faults"] if not row["found"])
    assert not [row["run"] for row in table["healthy"] if row["alarms"] or row["unclear"]]
    rates = table["rates"]
    assert (rates["found"], rates["faults"], rates["false_alarms"]) == (len(found), len(FAULTS), 0)


@cache
def again():
    table = audit([fault for fault in FAULTS if fault.name in AGAIN], [BY_NAME[name] for name in HEALTHY_AGAIN])
    return {row["fault"]: row for row in table["faults"]} | {row["run"]: row for row in table["healthy"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_a_fault_is_active_and_found_in_its_first_window(name):
    row = again()[name]
    assert row["broken"] == ""
    assert row["change"] > runs.ACTIVE
    assert (row["found"], row["after"]) == (True, 1), row


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY_AGAIN)
def test_a_healthy_run_balances(name):
    row = again()[name]
    assert (row["broken"], row["alarms"], row["unclear"]) == ("", [], [])
    assert row["windows"] == BY_NAME[name].verdicts
