"""TRAINFIX, TRAINFIX_DISABLE, TRAINFIX_QUIET: what they may be, and what a bad value says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import standin
from trainfix import settings


@pytest.mark.parametrize(
    ("environ", "mode", "disabled", "quiet"),
    [
        ({}, "on", set(), False),
        ({"TRAINFIX": ""}, "on", set(), False),
        ({"TRAINFIX": " OFF "}, "off", set(), False),
        ({"TRAINFIX": "warn"}, "warn", set(), False),
        ({"TRAINFIX": "strict", "TRAINFIX_QUIET": "1"}, "strict", set(), True),
        ({"TRAINFIX_QUIET": "0"}, "on", set(), False),
        ({"TRAINFIX_DISABLE": "TF-0001"}, "on", {"TF-0001"}, False),
        ({"TRAINFIX_DISABLE": " tf-0003 ,TF-0001,, "}, "on", {"TF-0001", "TF-0003"}, False),
    ],
)
def test_what_the_variables_mean(environ: dict[str, str], mode: str, disabled: set[str], quiet: bool) -> None:
    found = settings.read(environ)
    assert (found.mode, found.disabled, found.quiet, found.unknown) == (mode, disabled, quiet, ())


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TRAINFIX", "yes", "TRAINFIX='yes' means nothing; valid: on, off, warn, strict"),
        ("TRAINFIX_QUIET", "yes", "TRAINFIX_QUIET='yes' means nothing; valid: 0, 1"),
        (
            "TRAINFIX_DISABLE",
            "TF-0001,TF-9",
            f"TRAINFIX_DISABLE names 'TF-9', no such advisory; valid: {', '.join(settings.ADVISORY_IDS)}",
        ),
    ],
)
def test_a_bad_value_is_an_error_that_lists_the_valid_ones(variable: str, value: str, words: str) -> None:
    with pytest.raises(settings.SettingsError) as caught:
        settings.read({variable: value})
    assert str(caught.value) == words
    done = subprocess.run(
        [sys.executable, "-c", "import trainfix"],
        env=os.environ | {"PYTHONPATH": str(standin.SOURCE), variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"trainfix.settings.SettingsError: {words}"


def test_unknown_variables_of_ours_are_noted_and_others_are_not() -> None:
    environ = {"TRAINFIX_QUIETT": "1", "TRAINFIX_A": "", "TRAINFIXER": "1", "MY_TRAINFIX_": "1", "TRAINFIX": "on"}
    assert settings.read(environ).unknown == ("TRAINFIX_A", "TRAINFIX_QUIETT")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError, match="Settings are frozen: cannot set mode"):
        settings.read({}).mode = "off"


@pytest.mark.parametrize(
    ("value", "size"),
    [("", None), ("0", 0), ("4096", 4096), ("500MB", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("2gib", 2**31)],
)
def test_a_budget_is_written_in_bytes_or_their_multiples(value: str, size: int | None) -> None:
    assert settings.read({"TRAINFIX_GRADCOPY_BUDGET": value}).gradcopy_budget == size


@pytest.mark.parametrize("value", ["GiB", "-1", "8 apples", "nan", "8GiB GiB", "1e30TB"])
def test_a_budget_that_is_no_size_says_what_one_looks_like(value: str) -> None:
    with pytest.raises(settings.SettingsError) as caught:
        settings.read({"TRAINFIX_GRADCOPY_BUDGET": value})
    assert str(caught.value) == (
        f"TRAINFIX_GRADCOPY_BUDGET={value!r} means nothing; valid: bytes, such as 0, 500MB or 8GiB"
    )


def test_the_gradient_copy_is_chosen_by_name_and_may_be_kept_in_line() -> None:
    found = settings.read({"TRAINFIX_GRADCOPY": "Host-Add", "TRAINFIX_OVERLAP": "0"})
    assert (found.gradcopy, found.overlap) == ("host-add", False)
    assert (settings.read({}).gradcopy, settings.read({}).overlap) == ("auto", True)
    with pytest.raises(settings.SettingsError, match="'rings' means nothing; valid: auto, resident, ring"):
        settings.read({"TRAINFIX_GRADCOPY": "rings"})


def test_the_tiers_of_the_settings_are_those_of_the_gradient_copy() -> None:
    from trainfix.gradcopy import choice

    assert set(settings.GRADCOPY) == {"auto", *choice.ORDER[True, True]}


@pytest.mark.parametrize(
    ("value", "first", "every", "action", "out"),
    [
        ("1", 2, 0, "warn", None),
        ("first:3", 3, 0, "warn", None),
        ("first:2,every:500,action=warn,out=ledger", 2, 500, "warn", "ledger"),
        ("every=10, first=0 ,action:stop", 0, 10, "stop", None),
        ("action=stop,out=folder, with a comma", 2, 0, "stop", "folder, with a comma"),
        ("out=x", 2, 0, "warn", "x"),
    ],
)
def test_what_the_ledger_is_asked_for(value: str, first: int, every: int, action: str, out: str | None) -> None:
    found = settings.read({"TRAINFIX_LEDGER": value}).ledger
    assert found is not None
    assert (found.first, found.every, found.action, found.out) == (first, every, action, out)


@pytest.mark.parametrize("value", ["", "0", " "])
def test_no_ledger_is_asked_for(value: str) -> None:
    assert settings.read({"TRAINFIX_LEDGER": value}).ledger is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("frist:2", "frist"),
        ("first:two", "first"),
        ("first:-1", "first"),
        ("action=halt", "action"),
        ("first:0", "first"),
        ("yes", "yes"),
    ],
)
def test_a_ledger_that_means_nothing_says_where_and_what_is_valid(value: str, key: str) -> None:
    with pytest.raises(settings.SettingsError) as raised:
        settings.read({"TRAINFIX_LEDGER": value})
    assert f"means nothing at '{key}'" in str(raised.value)
    assert "first:2,every:500,action=warn,out=ledger" in str(raised.value)


def test_applying_a_repair_where_only_the_ledger_runs_keeps_the_ledger(tmp_path: Path) -> None:
    script = (
        "import trainfix\n"
        "from trainfix.engine import finder\n"
        "before = finder.current.mode\n"
        "trainfix.apply('TF-0001')\n"
        "print(before, finder.current.mode, finder.current.ledger.first)"
    )
    env = {**os.environ, "TRAINFIX": "off", "TRAINFIX_LEDGER": "first:7"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "off on 7\n", done.stderr
