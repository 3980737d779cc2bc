"""Advisories that exist only with some releases of another package, and are repaired through that package's repair;
and objects that use code of the user's own where a fix knows the package's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import standin

START = "import trainfix, standin.core\nfrom tests.support import standin as support\n"
LEANING = "[[r.state, r.reason, r.fix, r.installed] for r in trainfix.status() if r.id == 'SI-0003'][0]"


@pytest.fixture
def leaning(tmp_path: Path) -> Path:
    """The release with both errors, and a package that has one of them through it."""
    return standin.lean(standin.write(tmp_path), needs=">=2.0,<3.0")


def test_an_error_of_another_package_is_repaired_through_its_repair(leaning: Path) -> None:
    assert standin.answer(leaning, START + f"answer = {LEANING}\n") == ["applied", "through SI-0001", "standin", "1.0"]


def test_it_waits_for_the_import_of_the_package_at_fault(leaning: Path) -> None:
    state, reason, *_ = standin.answer(leaning, f"import trainfix\nanswer = {LEANING}\n")
    assert [state, reason] == ["waiting", "through SI-0001: standin is not imported yet"]


@pytest.mark.parametrize("needs", [">=3.0", "<2.0"])
def test_with_another_release_of_the_package_that_it_needs_it_does_not_exist(needs: str, tmp_path: Path) -> None:
    folder = standin.lean(standin.write(tmp_path), needs=needs)
    state, reason, *_ = standin.answer(folder, START + f"answer = {LEANING}\n")
    assert [state, reason] == ["not-affected", f"it needs standin{needs}; installed: 2.0"]


def test_reverting_it_reverts_the_repair_that_it_has_and_applying_it_applies_that(leaning: Path) -> None:
    script = f"""
back = trainfix.revert("SI-0003", "SI-0002")
broken = support.works()
again = [record.state for record in trainfix.apply("SI-0003")]
answer = [back, broken["total"], again, support.works()["total"], {LEANING}[0]]
"""
    back, broken, again, works, state = standin.answer(leaning, START + script)
    assert back == ["SI-0001", "SI-0002"]
    assert [broken, again, works, state] == [False, ["applied"], True, "applied"]


def test_disabled_alone_it_stays_repaired_and_one_warning_names_all_ids_together(leaning: Path) -> None:
    done = standin.python(leaning, START + f"print({LEANING}[0])", TRAINFIX_DISABLE="SI-0003")
    assert done.stdout == "applied\n"
    assert "SI-0003 stays repaired: its repair is shared with SI-0001, SI-0002" in done.stderr
    assert "TRAINFIX_DISABLE=SI-0001,SI-0002,SI-0003" in done.stderr


def test_a_refused_repair_of_the_other_package_is_its_state_too(tmp_path: Path) -> None:
    folder = standin.lean(standin.write(tmp_path, "neighbour"), needs=">=2.0")
    state, reason, *_ = standin.answer(folder, START + f"answer = {LEANING}\n")
    assert state == "refused"
    assert "through SI-0001" in reason and "Engine.check has an unknown body" in reason


def test_an_object_with_the_users_own_code_is_left_alone_and_that_is_said_once(tmp_path: Path) -> None:
    script = "engines = [standin.core.Engine(9), standin.core.Engine(9), standin.core.Engine(4)]"
    done = standin.python(standin.write(tmp_path), START + script)
    assert done.stderr.count("SI-0001, SI-0002 not-affected (own loss: user.loss)") == 1
    refused = standin.python(standin.write(tmp_path / "refused", "neighbour"), START + "standin.core.Engine(9)")
    assert refused.returncode == 0, "a run that uses code of its own does not reach what is refused"
