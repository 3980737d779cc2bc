"""`prove` shows the error on the installed release, shows that the fix ends it, and says so when it cannot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.releases import release
from trainfix.advisories import UnknownAdvisory
from trainfix.proofs import ChildProblem, exit_code, prove

SOURCE = Path(__file__).resolve().parents[2] / "src"


def environment(*folders: Path, **extra: str) -> dict[str, str]:
    """This process's, with these folders first on the path and none of the user's settings of trainfix but `extra`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("TRAINFIX")}
    return own | {"PYTHONPATH": os.pathsep.join(str(folder) for folder in (*folders, SOURCE))} | extra


def without_error(record: dict[str, Any]) -> bool:
    return (
        record["coefficients"] == pytest.approx([1] * 8, abs=1e-5)
        and record["relative_error"] < 1e-6
        and record["norm_ratio"] == pytest.approx(1, abs=1e-6)
    )


@pytest.mark.parametrize(
    ("advisory", "coefficients"),
    [("TF-0001", [1, 0, 0, 0, 0, 0, 0, 1]), ("TF-0003", [0, 0, 0, 0, 0, 0, 0, 1])],
)
def test_deepspeed_0_18_9_loses_micro_batches_and_keeps_all_with_trainfix(
    advisory: str, coefficients: list[float]
) -> None:
    record = prove(advisory, env=environment(release("0.18.9")))
    assert record["before"]["coefficients"] == pytest.approx(coefficients, abs=1e-5)
    assert record["before"]["relative_error"] > 0.5
    assert without_error(record["after"])
    assert (record["package"], record["installed"]) == ("deepspeed", "0.18.9")
    assert (record["applicable"], record["reproduced"], record["repaired"], record["reason"]) == (
        True,
        True,
        True,
        None,
    )
    assert exit_code([record]) == 0


def test_the_users_own_settings_of_trainfix_do_not_decide_what_is_proved() -> None:
    settings = {"TRAINFIX": "off", "TRAINFIX_DISABLE": "TF-0001"}
    record = prove("TF-0001", env=environment(release("0.15.2"), **settings))
    assert (record["reproduced"], record["repaired"]) == (True, True)


def test_deepspeed_0_19_8_is_right_and_nothing_is_repaired() -> None:
    record = prove("TF-0001", env=environment(release("0.19.8")))
    assert (record["applicable"], record["reproduced"], record["repaired"]) == (False, False, None)
    assert record["reason"] == "deepspeed 0.19.8 is fixed-upstream"
    assert without_error(record["before"])
    assert record["after"] is None
    assert exit_code([record]) == 0


def test_a_release_that_is_not_affected_is_not_run_unless_named() -> None:
    record = prove("TF-0001", env=environment(release("0.19.8")), named=False)
    assert (record["applicable"], record["reproduced"], record["before"]) == (False, None, None)
    assert record["seconds"] < 3


def test_a_missing_deepspeed_is_said_and_not_an_error() -> None:
    record = prove("TF-0001", env=environment())
    assert (record["installed"], record["applicable"], record["reproduced"]) == (None, False, None)
    assert record["reason"] == "deepspeed is not installed"
    assert exit_code([record]) == 0


def test_a_missing_torch_is_said(tmp_path: Path) -> None:
    tmp_path.joinpath("torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    record = prove("TF-0001", env=environment(tmp_path, release("0.18.9")))
    assert (record["applicable"], record["reproduced"], record["repaired"]) == (True, None, None)
    assert record["reason"].startswith("the experiment could not be run: the child ended with 1: ModuleNotFoundError")
    assert "No module named 'torch'" in record["reason"]
    assert exit_code([record]) == 3


def test_a_fix_that_cannot_be_imported_proves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "trainfix"
    broken.mkdir()
    broken.joinpath("__init__.py").write_text("raise RuntimeError('broken installation')\n")
    record = prove("TF-0001", env=environment(tmp_path, release("0.18.9")))
    assert (record["reproduced"], record["repaired"], record["after"]) == (True, None, None)
    assert record["reason"].endswith("RuntimeError: broken installation")
    assert exit_code([record]) == 3


def test_an_unknown_advisory_names_the_valid_ones() -> None:
    with pytest.raises(UnknownAdvisory, match="TF-0001"):
        prove("TF-9999")


def test_an_interpreter_that_does_not_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChildProblem, match="no-such-python"):
        prove("TF-0001", python=str(tmp_path / "no-such-python"))


@pytest.mark.parametrize(
    ("applicable", "reproduced", "repaired", "code"),
    [
        (True, True, True, 0),
        (True, True, False, 1),
        (True, True, None, 3),
        (True, False, None, 3),
        (True, None, None, 3),
        (None, None, None, 3),
        (False, False, None, 0),
        (False, None, None, 0),
        (False, True, None, 1),
    ],
)
def test_the_exit_code_follows_from_the_record(
    applicable: bool | None, reproduced: bool | None, repaired: bool | None, code: int
) -> None:
    record = {"applicable": applicable, "reproduced": reproduced, "repaired": repaired}
    assert exit_code([record]) == code


def test_an_error_that_stays_outranks_one_that_could_not_be_shown() -> None:
    stays = {"applicable": True, "reproduced": True, "repaired": False}
    unknown = {"applicable": True, "reproduced": None, "repaired": None}
    assert exit_code([unknown, stays]) == 1
    assert exit_code([]) == 0
