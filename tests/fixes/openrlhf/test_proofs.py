"""The proofs of TF-0101 to TF-0103 show the errors of the installed OpenRLHF, or say why they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import openrlhf_runs, stacks
from trainfix.proofs import prove

pytestmark = pytest.mark.slow


def proved(advisory: str, folders: list[Path]) -> dict[str, Any]:
    environment = stacks.environment(*folders, trainfix=True)
    return prove(advisory, env={key: value for key, value in environment.items() if key != "TRAINFIX"})


@pytest.mark.parametrize(
    ("advisory", "release", "worst"),
    [
        ("TF-0101", "0.9.10", [14.125, 9.417, 7.063, 14.125, 0.463, 14.125, 0.3104, 0.463]),
        ("TF-0103", "0.11.1", [6.273, 6.273, 1.095, 1.095]),
    ],
)
def test_a_proof_shows_the_error_of_the_release_and_that_it_is_gone_with_trainfix(
    advisory: str, release: str, worst: list[float]
) -> None:
    record = proved(advisory, openrlhf_runs.stack(release))
    assert (record["applicable"], record["reproduced"], record["repaired"]) == (True, True, True), record["reason"]
    assert record["before"]["coefficients"] == pytest.approx(worst, rel=1e-3)
    assert record["after"]["relative_error"] < 1e-5


def test_a_proof_says_that_openrlhf_cannot_be_imported_without_flash_attn() -> None:
    folders = [folder for folder in openrlhf_runs.stack("0.9.10") if folder.name != "flash_attn_on_cpu"]
    record = proved("TF-0101", folders)
    assert (record["applicable"], record["reproduced"], record["repaired"]) == (True, None, None)
    assert "No module named 'flash_attn'" in record["reason"]
