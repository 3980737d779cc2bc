"""What the engine decides about the stand-in's releases, what it says about it, and how it undoes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import standin

ALL = {"total": True, "keep": True, "backward": True}
NONE = {"total": False, "keep": False, "backward": False}

START = "import trainfix, standin.core\nfrom tests.support import standin as support\n"
REPORT = "answer = [support.states(), support.works(), {r.id: r.reason for r in trainfix.status()}]\n"


@pytest.fixture
def affected(tmp_path: Path) -> Path:
    """A folder with the release that has both errors."""
    return standin.write(tmp_path)


def report(folder: Path, script: str = "", **env: str) -> tuple[dict[str, str], dict[str, bool], dict[str, str]]:
    """States, what works, and reasons after `script`."""
    states, works, reasons = standin.answer(folder, START + script + "\n" + REPORT, **env)
    return states, works, reasons


# --- the table of decisions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "state", "reason"),
    [
        ("old", "not-affected", "standin 1.0 does not have this error"),
        ("affected", "applied", ""),
        ("unknown", "refused", "total has an unknown body (shape "),
        ("neighbour", "refused", "Engine.check has an unknown body (shape "),
        ("patched", "fixed-by-source-patch", "standin 2.0 was repaired with trainfix's source patch"),
        ("fixed", "fixed-upstream", "standin 3.0 has the repaired code"),
        ("newer", "unverified", "standin 9.0 is newer than 3.0, the last release that trainfix was run on"),
    ],
)
def test_the_shape_decides_and_the_version_narrows(release: str, state: str, reason: str, tmp_path: Path) -> None:
    states, works, reasons = report(standin.write(tmp_path, release))
    assert states == dict.fromkeys(standin.IDS, state)
    for text in reasons.values():
        assert reason in text and bool(reason) == bool(text)
    upstream = {"total": True, "keep": True, "backward": False}
    expected = {"applied": ALL, "fixed-upstream": upstream, "fixed-by-source-patch": upstream}
    assert works == expected.get(state, NONE)


def test_each_advisory_of_a_fix_is_judged_on_its_own_evidence(tmp_path: Path) -> None:
    states, works, reasons = report(standin.write(tmp_path, "half"))
    assert states == {"SI-0001": "applied", "SI-0002": "fixed-upstream"}
    assert works == ALL
    assert reasons == {"SI-0001": "", "SI-0002": "standin 2.1 has the repaired code"}


@pytest.mark.parametrize("release", ["fixed", "patched", "old", "unknown", "newer"])
def test_a_release_that_is_not_repaired_keeps_its_very_own_objects(release: str, tmp_path: Path) -> None:
    script = """
import standin.core, standin.functions
from standin.core import Engine
def everything():
    return [standin.functions.total, standin.core.total, *(value for value in vars(Engine).values() if callable(value))]
before = everything()
import trainfix
answer = [getattr(f, "__name__", "?") for f, g in zip(before, everything(), strict=True) if f is not g]
"""
    found = standin.answer(standin.write(tmp_path, release), script)
    # A refused one stands guard, and touches nothing else.
    assert found == (["__init__", "boundary"] if release == "unknown" else [])


def test_status_has_one_complete_record_per_advisory(affected: Path) -> None:
    script = START + "import dataclasses; answer = [dataclasses.asdict(record) for record in trainfix.status()]"
    first, second = standin.answer(affected, script)
    assert first["shape"] and first["shape"] != second["shape"]
    targets = ", ".join((standin.TOTAL, standin.KEEP, standin.BACKWARD, standin.STEP))
    assert {key: value for key, value in first.items() if key != "shape"} == {
        "id": "SI-0001",
        "fix": "standin",
        "package": "standin",
        "installed": "2.0",
        "target": targets,
        "state": "applied",
        "reason": "",
    }


def test_before_the_target_is_imported_the_state_is_waiting(affected: Path) -> None:
    script = (
        "import trainfix, sys; answer = [[r.state, r.reason, r.installed, r.target] for r in trainfix.status()]"
        "+ [any(m.startswith('standin') for m in sys.modules)]"
    )
    first, second, imported = standin.answer(affected, script)
    assert first == second == ["waiting", "standin is not imported yet", "2.0", None]
    assert imported is False


def test_of_several_copies_the_imported_one_is_judged(tmp_path: Path) -> None:
    first, second = standin.write(tmp_path / "first"), standin.write(tmp_path / "second", "fixed")
    script = f"import sys; sys.path.append({str(second)!r}); sys.path.insert(0, {str(second)!r})\n" + START
    script += "answer = [[r.installed, r.state] for r in trainfix.status()]"
    assert standin.answer(first, script) == [["3.0", "fixed-upstream"]] * 2


# --- somebody else was there first -----------------------------------------------------------------------------------

FOREIGN = """
import standin.core, functools
original = standin.core.Engine.{name}
@functools.wraps(original)
def foreign(*args):
    return original(*args)
standin.core.Engine.{name} = foreign
"""


def test_a_method_that_somebody_replaced_before_is_seen_named_and_left_alone(affected: Path) -> None:
    states, works, reasons = standin.answer(affected, FOREIGN.format(name="keep") + START + REPORT)
    assert states == dict.fromkeys(standin.IDS, "refused")
    assert works == NONE
    assert "Engine.keep was replaced by standin.core.Engine.keep (<string>:" in reasons["SI-0001"]


def test_a_wrapper_made_with_wrapt_is_named_by_its_own_code(affected: Path) -> None:
    script = """
import standin.core, wrapt
@wrapt.decorator
def outsider(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)
standin.core.Engine.keep = outsider(standin.core.Engine.keep)
"""
    states, _, reasons = standin.answer(affected, script + START + REPORT)
    assert states == dict.fromkeys(standin.IDS, "refused")
    assert "Engine.keep was replaced by __main__.outsider (<string>:" in reasons["SI-0001"]


def test_a_target_that_allows_it_is_wrapped_around_somebody_elses_replacement(affected: Path) -> None:
    states, works, _ = standin.answer(affected, FOREIGN.format(name="step") + START + REPORT)
    assert states == dict.fromkeys(standin.IDS, "applied")
    assert works == ALL


# --- disabling -------------------------------------------------------------------------------------------------------


def test_one_of_two_shared_ids_stays_applied_and_one_warning_names_them_all(affected: Path) -> None:
    done = standin.python(affected, START + REPORT + "print(answer)", TRAINFIX_DISABLE="SI-0002")
    states, works, reasons = eval(done.stdout)
    assert states == dict.fromkeys(standin.IDS, "applied")
    assert works == ALL
    assert reasons == {"SI-0001": "", "SI-0002": "shared with SI-0001"}
    warnings = [line for line in done.stderr.splitlines() if "SI-0002 stays repaired" in line]
    assert len(warnings) == 1
    assert "its repair is shared with SI-0001; to disable it, disable all together" in warnings[0]
    assert warnings[0].endswith("TRAINFIX_DISABLE=SI-0001,SI-0002")


def test_all_ids_disabled_replaces_nothing_and_guards_nothing(affected: Path) -> None:
    script = "print([type(vars(standin.core.Engine)[n]).__name__ for n in ('__init__', 'boundary', 'keep')])\n"
    done = standin.python(affected, START + script + REPORT + "print(answer)", TRAINFIX_DISABLE="SI-0002, si-0001")
    kinds, (states, works, reasons) = map(eval, done.stdout.splitlines())
    assert kinds == ["function"] * 3
    assert states == dict.fromkeys(standin.IDS, "disabled")
    assert works == NONE
    assert set(reasons.values()) == {"TRAINFIX_DISABLE"}
    assert done.stderr == ""


def test_what_is_not_affected_is_not_called_disabled(tmp_path: Path) -> None:
    states, _, _ = report(standin.write(tmp_path, "fixed"), TRAINFIX_DISABLE="SI-0001,SI-0002")
    assert states == dict.fromkeys(standin.IDS, "fixed-upstream")


def test_off_does_nothing_and_says_so_in_the_status(affected: Path) -> None:
    finders = "[type(f).__name__ for f in sys.meta_path if 'trainfix' in type(f).__module__]"
    done = standin.python(affected, START + REPORT + f"import sys; print(answer, {finders})", TRAINFIX="off")
    assert done.stdout.strip().endswith("[]")
    states, works, reasons = eval(done.stdout.strip().removesuffix("[]"))
    assert states == dict.fromkeys(standin.IDS, "disabled")
    assert works == NONE and set(reasons.values()) == {"TRAINFIX=off"}
    assert done.stderr == ""


# --- apply and revert ------------------------------------------------------------------------------------------------


def test_apply_wins_over_off_and_over_disable(affected: Path) -> None:
    for env in ({"TRAINFIX": "off"}, {"TRAINFIX_DISABLE": "SI-0001,SI-0002"}):
        states, works, _ = report(affected, "trainfix.apply()", **env)
        assert states == dict.fromkeys(standin.IDS, "applied")
        assert works == ALL


def test_apply_of_one_id_under_off_leaves_the_others_off(affected: Path) -> None:
    states, works, reasons = report(affected, "trainfix.apply('SI-0002')", TRAINFIX="off")
    assert states == dict.fromkeys(standin.IDS, "applied")
    assert works == ALL  # replaced together
    assert reasons["SI-0001"] == "shared with SI-0002"
    script = "import trainfix; trainfix.apply('SI-0002'); answer = [f'{r.state} {r.reason}' for r in trainfix.status()]"
    waiting = standin.answer(affected, script, TRAINFIX="off")
    assert waiting == ["disabled TRAINFIX=off", "waiting standin is not imported yet"]


def test_revert_gives_back_the_very_same_objects_and_apply_repairs_again(affected: Path) -> None:
    script = """
import standin.core, standin.functions
from standin.core import Engine
def everything():
    cell = vars(Engine)["backward"].__closure__[0].cell_contents
    return [standin.functions.total, standin.core.total, cell, *(v for v in vars(Engine).values() if callable(v))]
before = everything()
import trainfix
from tests.support import standin as support
changed = [a is b for a, b in zip(before, everything(), strict=True)]
back = trainfix.revert()
same = [a is b for a, b in zip(before, everything(), strict=True)]
trainfix.apply()
answer = [changed.count(False), back, all(same), support.works()]
"""
    changed, back, same, works = standin.answer(affected, script)
    assert changed == 6  # total twice, the inside of backward, keep, step, and the guarded constructor
    assert back == ["SI-0001", "SI-0002"]
    assert same is True
    assert works == ALL


def test_reverting_one_of_two_shared_ids_keeps_the_repair_and_says_so(affected: Path) -> None:
    done = standin.python(affected, START + "print(trainfix.revert('SI-0001'))\n" + REPORT + "print(answer)")
    back, (states, works, reasons) = map(eval, done.stdout.splitlines())
    assert back == ()
    assert states == dict.fromkeys(standin.IDS, "applied")
    assert works == ALL
    assert reasons["SI-0001"] == "shared with SI-0002"
    assert "SI-0001 stays repaired: its repair is shared with SI-0002" in done.stderr


def test_reverting_the_last_enabled_id_lists_what_else_comes_back(affected: Path) -> None:
    script = "back = trainfix.revert('SI-0001')\nassert back == ('SI-0001', 'SI-0002'), back"
    states, works, reasons = report(affected, script, TRAINFIX_DISABLE="SI-0002")
    assert states == {"SI-0001": "reverted", "SI-0002": "disabled"}
    assert works == NONE
    assert reasons == {"SI-0001": "trainfix.revert()", "SI-0002": "TRAINFIX_DISABLE"}


def test_revert_refuses_when_somebody_replaced_a_function_since_and_says_who(affected: Path) -> None:
    script = """
def intruder(self, value):
    pass
ours = vars(standin.core.Engine)["keep"]
standin.core.Engine.keep = intruder
try:
    trainfix.revert()
except RuntimeError as error:
    answer = [str(error), support.states(), standin.functions.total([1, 2, 3]), trainfix.status()[0].reason]
standin.core.Engine.keep = ours
assert trainfix.revert() == ("SI-0001", "SI-0002")
"""
    words, states, total, reason = standin.answer(affected, START + script)
    assert words.startswith("cannot revert SI-0001, SI-0002: standin.core.Engine.keep (")
    assert reason.startswith("keep has since been replaced by __main__.intruder (<string>:")
    assert "has since been replaced by __main__.intruder (<string>:" in words
    assert states == dict.fromkeys(standin.IDS, "applied")
    assert total == 6


def test_an_object_in_the_middle_of_a_window_finishes_it_repaired_after_a_revert(affected: Path) -> None:
    script = """
engine = standin.core.Engine(2)
engine.keep(1.5)
trainfix.revert()
engine.keep(2.5)
first = list(engine.values)
engine.step()
engine.keep(1.5)
answer = [first, engine.values, sorted(vars(engine))]
"""
    first, second, attributes = standin.answer(affected, START + script)
    assert first == [1.5, 2.5]
    assert second == [2]
    assert attributes == ["steps", "values"]


def test_a_revert_and_an_apply_in_the_same_window_change_nothing(affected: Path) -> None:
    script = """
engine = standin.core.Engine(2)
engine.keep(1.5)
trainfix.revert()
trainfix.apply()
engine.keep(2.5)
first = list(engine.values)
engine.step()
engine.keep(3.5)
answer = [first, engine.values, sorted(vars(engine))]
"""
    assert standin.answer(affected, START + script) == [[1.5, 2.5], [3.5], ["steps", "values"]]


def test_reverting_a_refused_advisory_leaves_the_guard_of_the_other(tmp_path: Path) -> None:
    folder = standin.write(tmp_path, "neighbour")
    script = """
trainfix.revert("SI-0001")
standin.core.Engine(4)
try:
    standin.core.Engine(2).boundary(False)
except trainfix.UnfixedBugError as error:
    answer = [support.states(), error.advisory]
"""
    states, stopped = standin.answer(folder, START + script)
    assert states == {"SI-0001": "reverted", "SI-0002": "refused"}
    assert stopped == "SI-0002"


@pytest.mark.parametrize("call", ["apply", "revert"])
def test_an_unknown_id_lists_the_known_ones(call: str, affected: Path) -> None:
    done = standin.python(affected, START + f"trainfix.{call}('SI-0003')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("no advisory 'SI-0003'; known: SI-0001, SI-0002")


def test_apply_by_name_raises_for_what_cannot_be_repaired_and_apply_of_all_does_not(tmp_path: Path) -> None:
    folder = standin.write(tmp_path, "unknown")
    script = """
trainfix.apply()
try:
    trainfix.apply("SI-0001")
except trainfix.UnfixedBugError as error:
    answer = [str(error), error.advisory]
"""
    words, id = standin.answer(folder, START + script)
    assert words.startswith("SI-0001 cannot be repaired: refused: standin 2.2: total has an unknown body")
    assert id == "SI-0001"


# --- failures of ours ------------------------------------------------------------------------------------------------

UNTOUCHED = """
import standin.core, standin.functions
from standin.core import Engine
before = [standin.functions.total, standin.core.total, vars(Engine)["keep"], vars(Engine)["step"]]
import trainfix
after = [standin.functions.total, standin.core.total, vars(Engine)["keep"], vars(Engine)["step"]]
assert all(a is b for a, b in zip(before, after, strict=True))
from tests.support import standin as support
"""


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("raise", "the repair could not be put in place: ValueError: the fix is in a bad mood"),
        ("missing", "the repair could not be put in place: Missing: standin.core:Engine.gone does not exist"),
    ],
)
def test_a_fix_that_raises_is_rolled_back_and_the_import_goes_on(trouble: str, reason: str, affected: Path) -> None:
    done = standin.python(affected, UNTOUCHED + REPORT + "print(answer)", STANDIN_TROUBLE=trouble)
    states, works, reasons = eval(done.stdout)
    assert states == dict.fromkeys(standin.IDS, "failed")
    assert works == NONE
    assert set(reasons.values()) == {reason}
    assert f"{', '.join(standin.IDS)} failed (standin 2.0): {reason}" in done.stderr


def test_a_function_that_cannot_be_replaced_at_one_alias_is_replaced_at_none(affected: Path) -> None:
    script = """
import sys, types, standin.functions
class Stubborn(types.ModuleType):
    def __setattr__(self, name, value):
        raise TypeError("read-only")
stubborn = sys.modules["stubborn"] = Stubborn("stubborn")
vars(stubborn)["total"] = standin.functions.total
"""
    states, works, reasons = standin.answer(affected, script + UNTOUCHED + REPORT)
    assert states == dict.fromkeys(standin.IDS, "failed")
    assert works == NONE
    assert "TypeError: read-only" in reasons["SI-0001"]


def test_a_failed_repair_that_is_reached_stops_the_run(affected: Path) -> None:
    done = standin.python(affected, START + "standin.core.Engine(4)", STANDIN_TROUBLE="raise")
    assert done.returncode == 1
    assert "UnfixedBugError: SI-0001 is reached and not repaired" in done.stderr


def _break_metadata(folder: Path) -> None:
    (folder / "standin-2.0.dist-info" / "METADATA").write_text("Name: standin\n")


def _truncate_record(folder: Path) -> None:
    record = folder / "records" / "SI-0001.json"
    record.write_text(record.read_text()[:100])


def _break_fix(folder: Path) -> None:
    (folder / "fix_of_standin.py").write_text("import no_such_module\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_break_metadata, "has no version in its metadata: the installation is broken"),
        (_truncate_record, "cannot read the record"),
        (_break_fix, "nothing is repaired in standin.functions: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_nothing_broken_on_our_side_breaks_the_users_import(
    harm: Callable[[Path], None], words: str, affected: Path
) -> None:
    harm(affected)
    done = standin.python(affected, START + "print(support.works())")
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == NONE
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    strict = standin.python(affected, START, TRAINFIX="strict")
    assert strict.returncode == 1
    assert "UnfixedBugError" in strict.stderr and words in strict.stderr


def test_a_python_whose_shapes_cannot_be_compared_is_one_clear_failure(affected: Path) -> None:
    script = """
from trainfix.environment import shapes
shapes._SAMPLE_SHAPE = "another"
shapes._check_sample.cache_clear()
"""
    states, works, reasons = standin.answer(affected, script + START + REPORT)
    assert states == dict.fromkeys(standin.IDS, "failed")
    assert works == NONE
    assert "this Python hashes trainfix's bundled sample as" in reasons["SI-0001"]


# --- strict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "state"), [("unknown", "refused"), ("newer", "unverified")])
def test_strict_stops_at_the_import_of_what_cannot_be_repaired(release: str, state: str, tmp_path: Path) -> None:
    done = standin.python(standin.write(tmp_path, release), START, TRAINFIX="strict")
    assert done.returncode == 1
    assert re.search(rf"UnfixedBugError: trainfix 0.1.0: SI-0001(, SI-0002)? {state} \(standin ", done.stderr)
    assert "TRAINFIX=strict stops at the import of what cannot be repaired." in done.stderr


def test_strict_stops_at_a_failure_and_not_at_a_success_nor_at_what_is_disabled(affected: Path, tmp_path: Path) -> None:
    assert standin.python(affected, START, TRAINFIX="strict").returncode == 0
    failed = standin.python(affected, START, TRAINFIX="strict", STANDIN_TROUBLE="raise")
    assert failed.returncode == 1 and "SI-0001, SI-0002 failed" in failed.stderr
    unknown = standin.write(tmp_path / "unknown", "unknown")
    disabled = standin.python(unknown, START, TRAINFIX="strict", TRAINFIX_DISABLE="SI-0001,SI-0002")
    assert disabled.returncode == 0, disabled.stderr


# --- what is said, and to whom ---------------------------------------------------------------------------------------

SUMMARY = "trainfix 0.1.0: SI-0001, SI-0002 applied (standin 2.0)\n"


def test_the_summary_goes_to_stderr_when_nobody_listens(affected: Path) -> None:
    done = standin.python(affected, START)
    assert (done.stdout, done.stderr) == ("", SUMMARY)
    assert standin.python(affected, "import logging\n" + START).stderr == SUMMARY


@pytest.mark.parametrize("name", ["'trainfix'", ""])
def test_the_summary_goes_to_the_logger_when_it_or_the_root_has_a_handler(name: str, affected: Path) -> None:
    script = f"""
import logging, sys
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
logger = logging.getLogger({name})
logger.addHandler(handler)
logging.getLogger("trainfix").setLevel("INFO")
"""
    done = standin.python(affected, script + START)
    assert (done.stdout, done.stderr) == (f"trainfix INFO {SUMMARY}", "")


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_the_summary_is_said_on_the_first_rank_only(variable: str, affected: Path) -> None:
    assert standin.python(affected, START, **{variable: "1"}).stderr == ""
    assert standin.python(affected, START, **{variable: "0"}).stderr == SUMMARY


def test_quiet_silences_the_summary_and_nothing_else(affected: Path, tmp_path: Path) -> None:
    assert standin.python(affected, START, TRAINFIX_QUIET="1").stderr == ""
    refused = standin.python(standin.write(tmp_path / "unknown", "unknown"), START, TRAINFIX_QUIET="1")
    assert "SI-0001 refused" in refused.stderr


def test_refusals_are_said_on_every_rank_once_and_unverified_on_the_first(tmp_path: Path) -> None:
    again = START + "import importlib; importlib.reload(standin.functions); trainfix.apply()"
    refused = standin.python(standin.write(tmp_path / "unknown", "unknown"), again, RANK="3")
    assert refused.stderr.count("SI-0001 refused (standin 2.2)") == 1
    newer = standin.write(tmp_path / "newer", "newer")
    assert standin.python(newer, again, RANK="3").stderr == ""
    assert standin.python(newer, again, RANK="0").stderr.count("SI-0001, SI-0002 unverified (standin 9.0)") == 1


@pytest.mark.parametrize(
    ("variable", "nearest"), [("TRAINFIX_DISABEL", "TRAINFIX_DISABLE"), ("TRAINFIX_QUITE", "TRAINFIX_QUIET")]
)
def test_an_unknown_variable_is_one_warning_that_names_the_nearest(variable: str, nearest: str, affected: Path) -> None:
    done = standin.python(affected, START + "import importlib; importlib.reload(trainfix)", **{variable: "1"})
    warning = f"trainfix: {variable} is not a variable that trainfix knows; did you mean {nearest}?\n"
    assert done.stderr == warning + SUMMARY
