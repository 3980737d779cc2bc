"""How offloaded gradients travel, as a user sees it: the variables, one line as the engine is built, and `status()`."""

from __future__ import annotations

import re

import pytest

from tests.fixes.deepspeed.judging import assert_right
from tests.support import experiment
from tests.support.releases import release

pytestmark = pytest.mark.slow
HEAD = r"trainfix \d+\.\d+\.\d+: offloaded gradients are carried by "


def run(version, **variables):
    asked = {"scenario": "carried", "ga": 4, "dtype": "bf16"}
    options = {"trainfix": True, "program": "tests.fixes.deepspeed.scenarios", "env": variables}
    (result,) = experiment.run(release(version), [asked], **options)
    assert result["error"] is None
    return result


@pytest.mark.parametrize(
    ("variables", "at_first", "at_last"),
    [
        ({}, "torch (the gradients are on the host)", None),
        (
            {"TRAINFIX_GRADCOPY": "ring"},
            "ring, copies in line with the backward pass, 128 MiB on the device (asked for)",
            None,
        ),
        ({"TRAINFIX_GRADCOPY": "host-add"}, "host-add, in a thread, 128 MiB between device and host (asked for)", None),
        (
            {"TRAINFIX_GRADCOPY": "resident", "TRAINFIX_GRADCOPY_BUDGET": "1GiB"},
            "resident, from the second window on; the rest by torch (asked for)",
            "resident, 0 MiB on the device; the rest by torch (asked for)",
        ),
        (
            {"TRAINFIX_GRADCOPY": "resident", "TRAINFIX_GRADCOPY_BUDGET": "10"},
            "resident, from the second window on; the rest by torch (asked for)",
            "resident, no memory is left on the device; the rest by torch (asked for)",
        ),
    ],
    ids=str,
)
def test_one_line_and_status_say_how_gradients_travel_on_0_18_9(variables, at_first, at_last):
    result = run("0.18.9", **variables)
    assert_right(result)
    assert len(result["said"]) == 1
    assert re.fullmatch(HEAD + re.escape(at_first), result["said"][0])
    assert result["said_later"] == []
    travels = "gradients carried by "
    assert result["reasons"] == ["", travels + at_first, travels + (at_last or at_first)]


def test_a_quiet_run_says_nothing_but_status_does():
    result = run("0.18.9", TRAINFIX_QUIET="1")
    assert result["said"] == []
    assert "gradients carried by torch" in result["reasons"][1]


def test_nothing_is_carried_where_deepspeed_0_19_8_sums_by_itself():
    result = run("0.19.8")
    assert (result["said"], result["said_later"]) == ([], [])
    assert not any("carried" in reason for reason in result["reasons"])
