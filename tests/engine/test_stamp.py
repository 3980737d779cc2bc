"""A checkpoint of a repaired run says so, and a run that goes on from another one is told; on real releases at the end.

The stand-in's Engine gets a `save` and a `load` here, which the stamp's table is told about.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Once
from tests.support import experiment, stacks, standin, trainer_runs
from tests.support.releases import release
from trainfix import settings
from trainfix.engine import stamp
from trainfix.environment.checkpoints import NAME, read

_METHODS = '''
    def save(self, folder, fail=False):
        """Save it."""
        import os
        if fail:
            raise OSError("the disk is full")
        os.makedirs(folder, exist_ok=True)
        return folder

    def load(self, folder):
        return folder


class Other(Engine):'''

# Before the target is imported: where it saves and loads.
TABLE = """
from trainfix.engine import stamp
stamp.PLACES["standin"] = (
    stamp.Place("standin.core:Engine.save", lambda call, saved: [call["folder"]]),
    stamp.Place("standin.core:Engine.load", lambda call, loaded: [loaded], loads=True),
)
"""
START = f"import trainfix\n{TABLE}\nimport standin.core, os\nfrom standin.core import Engine, Other\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The release that has both errors, with `save` and `load`."""
    return saving(tmp_path / "package")


def saving(folder: Path, name: str = "affected") -> Path:
    core = standin.write(folder, name) / "standin" / "core.py"
    core.write_text(core.read_text().replace("\n\nclass Other(Engine):", _METHODS, 1))
    return folder


def run(folder: Path, script: str, **env: str) -> str:
    """What is said while `script` runs to its end."""
    done = standin.python(folder, START + script, **env)
    assert done.returncode == 0, done.stderr
    return done.stderr


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_repaired_run_says_what_was_repaired(folder: Path, tmp_path: Path) -> None:
    run(folder, f"assert Engine(4).save({str(tmp_path / 'out')!r}) == {str(tmp_path / 'out')!r}")
    assert os.listdir(tmp_path / "out") == [NAME]
    found = read(str(tmp_path / "out"))
    assert [(one.id, one.fix, one.package) for one in found.applied] == [
        ("SI-0001", "standin", "standin"),
        ("SI-0002", "standin", "standin"),
    ]
    assert all(one.shape for one in found.applied)
    assert found.trainfix == "0.1.0" and found.states == {} and found.partly == ()


def test_what_was_healthy_or_disabled_is_told_apart_from_what_was_repaired(folder: Path, tmp_path: Path) -> None:
    half = saving(tmp_path / "half", "half")
    run(half, f"Engine(4).save({str(tmp_path / 'out')!r})")
    found = read(str(tmp_path / "out"))
    assert (found.ids, found.states) == ({"SI-0001"}, {"SI-0002": "fixed-upstream"})


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("fixed", {}),
        ("unknown", {"TRAINFIX": "warn"}),
        ("affected", {"TRAINFIX_DISABLE": "SI-0001,SI-0002"}),
        ("affected", {"TRAINFIX": "off"}),
        ("affected", {"TRAINFIX_STAMP": "0"}),
    ],
)
def test_where_nothing_is_repaired_or_stamps_are_off_the_very_same_methods_stay(
    name: str, env: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = f"Engine(2).save({str(out)!r}); assert not hasattr(Engine.save, '__wrapped__')\n"
    run(saving(tmp_path / "package", name), script + "assert not hasattr(Engine.load, '__wrapped__')", **env)
    assert os.listdir(out) == []


def test_only_the_first_rank_writes(folder: Path, tmp_path: Path) -> None:
    run(folder, f"Engine(4).save({str(tmp_path / 'out')!r})", RANK="1")
    assert os.listdir(tmp_path / "out") == []


def test_a_wrapped_method_keeps_its_signature_and_what_it_raises(folder: Path, tmp_path: Path) -> None:
    script = """
import inspect
assert str(inspect.signature(Engine.save)) == "(self, folder, fail=False)" and Engine.save.__doc__ == "Save it."
try:
    Engine(4).save(folder="nowhere", fail=True)
except OSError as error:
    assert str(error) == "the disk is full"
    print("raised")
"""
    assert "trainfix: no" not in run(folder, script)
    assert not Path("nowhere").exists()


def test_an_error_while_the_stamp_is_written_is_one_warning(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / NAME).mkdir(parents=True)  # in the way
    said = run(folder, f"engine = Engine(4)\nengine.save({str(out)!r}); engine.save({str(out)!r})")
    assert said.count("trainfix: no trainfix.json is written (standin.core:Engine.save): IsADirectoryError") == 1
    assert os.listdir(out) == [NAME], "nothing unfinished stays"


def test_the_file_is_replaced_whole_and_readable_by_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / NAME).write_text("what an earlier save left")
    os.link(out / NAME, tmp_path / "before")
    run(folder, f"os.umask(0o022); Engine(4).save({str(out)!r})")
    assert (tmp_path / "before").read_text() == "what an earlier save left"
    assert stat.S_IMODE((out / NAME).stat().st_mode) == 0o644
    assert read(str(out)).ids == {"SI-0001", "SI-0002"}


# --- coming and going ------------------------------------------------------------------------------------------------


def test_a_revert_takes_the_posts_out_and_an_apply_puts_them_back(folder: Path, tmp_path: Path) -> None:
    script = """
def wrapped():
    return [hasattr(Engine.save, "__wrapped__"), hasattr(Engine.load, "__wrapped__")]
found = [wrapped()]
trainfix.revert("SI-0001"); found.append(wrapped())
trainfix.revert(); found.append(wrapped())
Engine(2).save(FOLDER); found.append(os.listdir(FOLDER))
trainfix.apply(); found.append(wrapped())
trainfix.apply(); found.append(hasattr(Engine.save.__wrapped__, "__wrapped__"))
answer = found
""".replace("FOLDER", repr(str(tmp_path / "out")))
    on, off = [True, True], [False, False]
    assert standin.answer(folder, START + script) == [on, on, off, [], on, False]


def test_a_reloaded_module_is_watched_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, f"import importlib; importlib.reload(standin.core)\nstandin.core.Engine(4).save({str(out)!r})")
    assert os.listdir(out) == [NAME]


def test_it_stands_at_the_same_method_as_a_guard_and_both_come_and_go(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = f"""
import trainfix, os
from trainfix.engine import stamp
stamp.PLACES["standin"] = (stamp.Place("standin.core:Engine.__init__", lambda call, saved: [{str(out)!r}]),)
import standin.core
from standin.core import Engine, Other
def seen(cls=Engine, steps=2):
    cls(steps)
    there = os.listdir({str(out)!r})
    for name in there:
        os.unlink(os.path.join({str(out)!r}, name))
    return there
def stopped():
    try:
        Other(4)
    except trainfix.UnfixedBugError:
        return True
    return False
found = [seen(), stopped()]
trainfix.revert("SI-0002"); found += [seen(), stopped()]
trainfix.revert(); found += [seen(), stopped(), hasattr(Engine.__init__, "__wrapped__")]
trainfix.apply(); found += [seen(), stopped()]
answer = found
"""
    stamped = [["trainfix.json"], True]
    assert standin.answer(folder, script) == [*stamped, *stamped, [], False, False, *stamped]


def test_one_that_somebody_has_wrapped_since_does_nothing_after_a_revert(folder: Path, tmp_path: Path) -> None:
    script = """
ours = Engine.save
def theirs(self, folder):
    return ours(self, folder)
Engine.save = theirs
Engine(2).save(FOLDER); found = [os.listdir(FOLDER)]
trainfix.revert(); os.unlink(FOLDER + "/trainfix.json")
Engine(2).save(FOLDER); found.append(os.listdir(FOLDER))
trainfix.apply(); Engine(2).save(FOLDER); found += [os.listdir(FOLDER), Engine.save is theirs]
answer = found
""".replace("FOLDER", repr(str(tmp_path / "out")))
    assert standin.answer(folder, START + script) == [[NAME], [], [NAME], True]


def test_a_place_that_a_release_does_not_have_is_one_warning(folder: Path) -> None:
    table = 'stamp.PLACES["standin"] = (stamp.Place("standin.core:Engine.gone", lambda call, saved: []),)\n'
    done = standin.python(folder, START.replace("\nimport standin.core", table + "\nimport standin.core") + "Engine(2)")
    words = "trainfix: checkpoints will not be stamped at standin.core:Engine.gone: standin.core:Engine.gone does not"
    assert done.stderr.count(words) == 1


# --- loading ---------------------------------------------------------------------------------------------------------


def stamped(folder: Path, **changes: Any) -> str:
    """A checkpoint with a stamp that says that both errors were repaired, but for the changes."""
    applied = [{"id": id, "fix": "standin", "package": "standin", "shape": None} for id in standin.IDS]
    right = {"schema": 1, "trainfix": "0.0.9", "date": "2026-01-02T03:04:05Z", "packages": {"standin": "2.0"}}
    folder.mkdir(parents=True)
    (folder / NAME).write_text(json.dumps({**right, "applied": applied, "states": {}, "partly": [], **changes}))
    return str(folder)


ONLY_FIRST = [{"id": "SI-0001", "fix": "standin", "package": "standin", "shape": None}]


def test_going_on_from_a_checkpoint_without_a_stamp_is_warned_of_once(folder: Path, tmp_path: Path) -> None:
    said = run(folder, f"engine = Engine(4)\nfor _ in range(2): engine.load({str(tmp_path)!r})\nEngine(4).load('/')")
    assert [line for line in said.splitlines() if "so far" in line] == [
        "trainfix 0.1.0: the run so far was trained without trainfix's repairs (no trainfix.json in "
        f"{tmp_path}, which TRAINFIX_STAMP=0 would explain too). It goes on with SI-0001, SI-0002 repaired, so its "
        "steps are not all alike: `trainfix show SI-0001` says what that means; only a run from the start is trained "
        "alike throughout."
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"applied": ONLY_FIRST, "states": {"SI-0002": "fixed-upstream"}},
        {"applied": ONLY_FIRST, "states": {"SI-0002": "not-affected"}},
    ],
)
def test_going_on_from_one_that_was_trained_alike_says_nothing(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    assert "so far" not in run(folder, f"Engine(4).load({stamped(tmp_path / 'c', **changes)!r})")


def test_what_needs_no_repair_any_more_makes_no_difference(tmp_path: Path) -> None:
    half = saving(tmp_path / "half", "half")
    assert "so far" not in run(half, f"Engine(4).load({stamped(tmp_path / 'c')!r})")


def test_what_was_not_repaired_then_is_named(folder: Path, tmp_path: Path) -> None:
    checkpoint = stamped(tmp_path / "c", applied=ONLY_FIRST, states={"SI-0002": "disabled"})
    said = run(folder, f"Engine(4).load({checkpoint!r})")
    assert (
        f"the run so far was trained with other repairs ({checkpoint}/trainfix.json): it goes on with SI-0002 "
        "repaired, and was not from the start: `trainfix show SI-0002`"
    ) in said


def test_what_is_not_repaired_any_more_is_named_with_the_reason(folder: Path, tmp_path: Path) -> None:
    record = folder / "records" / "SI-0002.json"
    found = json.loads(record.read_text())
    found["database_specific"]["trainfix"]["evidence"] = {standin.KEEP: {"affected": {"0" * 12: ""}}}  # unknown now
    record.write_text(json.dumps(found))
    said = run(folder, f"Engine(2).load({stamped(tmp_path / 'c')!r})")
    assert "SI-0002 was repaired and is not any more (refused: standin 2.0: Engine.keep has an unknown body" in said


def test_a_run_that_no_repair_looks_after_may_go_on_from_anything(folder: Path, tmp_path: Path) -> None:
    assert "so far" not in run(folder, f"Other(2).load({str(tmp_path)!r})")


def test_a_loss_of_precision_is_no_reason_to_warn(folder: Path, tmp_path: Path) -> None:
    for record in (folder / "records").glob("*.json"):
        record.write_text(record.read_text().replace('"severity": "gradient"', '"severity": "metric"'))
    assert "so far" not in run(folder, f"Engine(4).load({str(tmp_path)!r})")


def test_a_stamp_that_cannot_be_read_is_said_and_breaks_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{\x1b[31m")
    said = run(folder, f"Engine(4).load({str(tmp_path)!r})")
    assert "trainfix: whether the run so far was trained alike cannot be told (standin.core:Engine.load)" in said
    assert f"{tmp_path}/trainfix.json is not what trainfix writes" in said
    assert "\x1b" not in said


def test_the_next_checkpoint_remembers_what_was_repaired_for_a_part_of_the_run_only(
    folder: Path, tmp_path: Path
) -> None:
    first = stamped(tmp_path / "first", applied=ONLY_FIRST, states={"SI-0002": "disabled"})
    second, third = str(tmp_path / "second"), str(tmp_path / "third")
    run(folder, f"engine = Engine(4)\nengine.load({first!r}); engine.save({second!r})")
    assert read(second).partly == ("SI-0002",)
    said = run(folder, f"engine = Engine(4)\nengine.load({second!r}); engine.save({third!r})")
    assert "it goes on with SI-0002 repaired, and was not from the start" in said
    assert read(third).partly == ("SI-0002",)


# --- the setting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "on"), [("", True), ("1", True), (" 0 ", False)])
def test_the_variable_that_turns_stamps_off(value: str, on: bool) -> None:
    assert settings.read({"TRAINFIX_STAMP": value}).stamp is on
    assert settings.read({}).stamp is True


def test_another_value_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(settings.SettingsError, match=r"^TRAINFIX_STAMP='off' means nothing; valid: 0, 1$"):
        settings.read({"TRAINFIX_STAMP": "off"})


# --- real releases: DeepSpeed ----------------------------------------------------------------------------------------

PROGRAM = "tests.engine.checkpoint_runs"
OFFLOADED = {"TF-0001", "TF-0003", "TF-0004"}  # what 0.18.9 has, but for losses of precision


def actions(folder: Path, *do: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {"do": [[action, str(folder / name), *rest] for action, name, *rest in do], **more}


@pytest.fixture(scope="session")
def deepspeed(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Where DeepSpeed 0.18.9 saved, and what each run has said."""
    found = once("stamp-deepspeed", lambda: _deepspeed_runs(tmp_path_factory.mktemp("checkpoints")))
    return lambda name: found[name]


def _deepspeed_runs(folder: Path) -> dict[str, Any]:
    def run(*entries: dict[str, Any], trainfix: bool = True, env: Any = None, **more: Any) -> list[dict[str, Any]]:
        env = {"TRAINFIX_QUIET": "1", **(env or {})}  # how gradients travel is another matter
        results = experiment.run(release("0.18.9"), entries, trainfix=trainfix, program=PROGRAM, env=env, **more)
        assert [result["error"] for result in results] == [None] * len(entries)
        return results

    (bare,) = run(actions(folder, ("save", "bare")), trainfix=False, ranks=2)
    (off,) = run(actions(folder, ("save", "off"), ("load", "off")), env={"TRAINFIX_STAMP": "0"})
    two, silent, warned = run(
        actions(folder, ("save", "two"), ("save", "two", "mine")),
        actions(folder, ("load", "two"), ("load", "two", "mine")),
        actions(folder, ("load", "bare"), ("save", "went-on")),
        ranks=2,
    )
    without_zero = {"stage": 0, "offload": False}
    run(actions(folder, ("save", "plain"), configuration=without_zero), trainfix=False)
    other, reverted = run(
        actions(folder, ("load", "plain"), configuration=without_zero),
        {"do": [["revert"], ["save", str(folder / "reverted")]]},
    )
    calls = ("two heads", "loss and logits")
    composed = {"configuration": {**without_zero, "ga": 3}}
    run(*(actions(folder, ("save", call), call=call, **composed) for call in calls), trainfix=False)
    heads, logits = run(*(actions(folder, ("load", call), call=call, **composed) for call in calls))
    runs = {"bare": bare, "off": off, "two": two, "silent": silent, "warned": warned}
    runs |= {"heads": heads, "logits": logits}
    return {"folder": str(folder), **runs, "other": other, "reverted": reverted}


def where(folder: str | Path) -> list[str]:
    """The stamps below `folder`, and what a broken write would have left."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob(f"*{NAME}*"))


@pytest.mark.slow
def test_deepspeed_saves_one_stamp_for_two_ranks_beside_the_tags_files(deepspeed: Callable[[str], Any]) -> None:
    folder = Path(deepspeed("folder"), "two")
    assert where(folder) == ["global_step1/trainfix.json", "mine/trainfix.json"]
    assert len(os.listdir(folder / "mine")) > 2
    found = read(str(folder))
    assert found.file == str(folder / "mine" / NAME)
    assert found.ids >= OFFLOADED
    assert found.packages["deepspeed"] == "0.18.9" and found.packages["torch"].startswith("2.")
    assert {one.package for one in found.applied} == {"deepspeed"}
    assert found.states["TF-0013"] == "not-affected" or "TF-0013" in found.ids


@pytest.mark.slow
def test_deepspeed_saves_none_without_trainfix_or_with_stamps_off_or_reverted(deepspeed: Callable[[str], Any]) -> None:
    for name in ("bare", "off", "reverted"):
        assert where(Path(deepspeed("folder"), name)) == []
        assert deepspeed(name)["wrapped"] == [False, False]
    assert deepspeed("off")["said"] == []


@pytest.mark.slow
def test_deepspeed_that_goes_on_from_its_own_checkpoint_says_nothing(deepspeed: Callable[[str], Any]) -> None:
    assert [line for line in deepspeed("silent")["said"] if "so far" in line] == []
    assert deepspeed("silent")["wrapped"] == [True, True]


@pytest.mark.slow
def test_deepspeed_that_goes_on_from_an_unrepaired_one_warns_and_remembers(deepspeed: Callable[[str], Any]) -> None:
    (words,) = deepspeed("warned")["said"]
    assert "the run so far was trained without trainfix's repairs (no trainfix.json in " in words
    assert f"{deepspeed('folder')}/bare" in words
    assert "It goes on with TF-0001, TF-0003, TF-0004" in words
    assert set(read(str(Path(deepspeed("folder"), "went-on"))).partly) >= OFFLOADED


@pytest.mark.slow
def test_deepspeed_with_an_optimizer_that_no_repair_looks_after_says_nothing(deepspeed: Callable[[str], Any]) -> None:
    assert [line for line in deepspeed("other")["said"] if "so far" in line] == []


@pytest.mark.slow
def test_an_error_of_single_calls_is_told_only_where_such_a_call_was_mended(deepspeed: Callable[[str], Any]) -> None:
    """TF-0032: DeepSpeed itself divides the loss of two heads once, and one returned with its logits twice."""
    assert [line for line in deepspeed("heads")["said"] if "so far" in line] == []
    (words,) = [line for line in deepspeed("logits")["said"] if "so far" in line]
    assert "It goes on with TF-0032" in words


# --- real releases: what the table of places assumes ------------------------------------------------------------------

RELEASES = {
    "deepspeed.runtime.engine": [("deepspeed", "0.14.0"), ("deepspeed", "0.18.9"), ("deepspeed", "0.19.8")],
    "transformers.trainer": [("transformers", "4.41.0"), ("transformers", "4.48.3"), ("transformers", "5.6.0")],
    "accelerate.accelerator": [("accelerate", "1.0.1"), ("accelerate", "1.11.0")],
    "openrlhf.utils.deepspeed.deepspeed": [("openrlhf", "0.9.10")],
}


@pytest.mark.slow
@pytest.mark.parametrize("place", stamp.of_packages(stamp.PLACES), ids=lambda place: place.path)
def test_every_place_exists_from_the_oldest_to_the_newest_release_with_the_arguments_that_are_used(
    place: stamp.Place,
) -> None:
    used = set(re.findall(r'call\["(\w+)"\]', inspect.getsource(place.folders))) - {"self"}
    for name, version in RELEASES[place.module]:
        text = stacks.folder(name, version).joinpath(*place.module.split(".")).with_suffix(".py").read_text()
        cls, method = place.path.partition(":")[2].split(".")
        body = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == cls)
        found = next(node for node in body.body if isinstance(node, ast.FunctionDef) and node.name == method)
        assert used <= {argument.arg for argument in found.args.args + found.args.kwonlyargs}, (name, version)


# --- real releases: transformers, accelerate, OpenRLHF ---------------------------------------------------------------


def training(folder: Path, resume: Path | None = None, *, bare: bool = False) -> dict[str, Any]:
    """Three windows with transformers' Trainer, which saves after each into `folder`."""
    arguments = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    more = {"resume_from_checkpoint": str(resume)} if resume is not None else {}
    prepare = f"{PROGRAM}:{'prepare_bare' if bare else 'prepare'}"
    return {"steps": 2, "rows": 12, "arguments": {**arguments, **more}, "prepare": prepare}


def trained(*trainings: dict[str, Any], trainfix: bool = True, **more: Any) -> list[list[str]]:
    """What trainfix said of the run so far while transformers 4.48.3 did these, one after the other."""
    deepspeed = {"deepspeed": "0.18.9"} if any("deepspeed" in one for one in trainings) else {}
    results = trainer_runs.run(stacks.stack(transformers="4.48.3", **deepspeed), trainings, trainfix=trainfix, **more)
    assert [result["error"] for result in results] == [None] * len(trainings)
    said = [Path(one["arguments"]["output_dir"], "said").read_text().splitlines() for one in trainings]
    return [[line for line in lines if "so far" in line or NAME in line] for lines in said]


@pytest.mark.slow
def test_transformers_saves_a_stamp_in_each_checkpoint_and_beside_the_model(tmp_path: Path) -> None:
    assert trained(training(tmp_path), ranks=2) == [[]]
    folders = ["checkpoint-1", "checkpoint-2", "checkpoint-3", "model"]
    assert where(tmp_path) == [f"{name}/trainfix.json" for name in folders]
    found = read(str(tmp_path))
    assert found.file == str(tmp_path / "checkpoint-3" / NAME)
    assert {one.package for one in found.applied} == {"transformers"}
    assert {"TF-0402", "TF-0405"} <= found.ids
    assert found.packages["transformers"] == "4.48.3"


@pytest.mark.slow
def test_transformers_warns_when_it_goes_on_from_an_unrepaired_checkpoint_only(tmp_path: Path) -> None:
    bare, on, again = (tmp_path / name for name in ("bare", "on", "again"))
    trained(training(bare), trainfix=False)
    assert trained(training(tmp_path / "off"), env={"TRAINFIX_STAMP": "0"}) == [[]]
    assert where(tmp_path) == []
    warned, different = trained(training(on, bare / "checkpoint-1"), training(again, on / "checkpoint-2"))
    assert [f"without trainfix's repairs (no trainfix.json in {bare}/checkpoint-1" in line for line in warned] == [True]
    assert read(str(on)).partly != ()
    assert [f"with other repairs ({on}/checkpoint-2/trainfix.json)" in line for line in different] == [True]


@pytest.mark.slow
def test_transformers_under_deepspeed_saves_both_and_goes_on_from_them_silently(tmp_path: Path) -> None:
    first = training(tmp_path / "first")
    second = training(tmp_path / "second", tmp_path / "first" / "checkpoint-2")
    third = training(tmp_path / "third", tmp_path / "first" / "checkpoint-1", bare=True)
    runs = [{**one, "deepspeed": {"stage": 2, "offload": True}} for one in (first, second, third)]
    nothing, silent, warned = trained(*runs)
    assert nothing == silent == []
    assert ["without trainfix's repairs" in line for line in warned] == [True]
    assert where(tmp_path / "first" / "checkpoint-2") == ["global_step2/trainfix.json", "trainfix.json"]
    trainers, engines = (read(str(tmp_path / "first" / "checkpoint-2" / name)) for name in (".", "global_step2"))
    partly = [read(str(tmp_path / "third" / "checkpoint-3" / name)).partly for name in (".", "global_step3")]
    assert partly[0] == partly[1] and {"TF-0001", "TF-0403"} <= set(partly[0])
    assert trainers.ids == engines.ids and {"TF-0001", "TF-0403"} <= trainers.ids


@pytest.mark.slow
def test_accelerate_saves_and_loads_with_a_stamp(tmp_path: Path) -> None:
    folders = stacks.stack(accelerate="1.7.0", deepspeed="0.16.9")
    entries = [
        {"accelerate": True, **actions(tmp_path, ("save", "out"), ("load", "out"))},
        {"accelerate": True, **actions(tmp_path, ("load", "bare"))},
    ]
    bare = [{"accelerate": True, **actions(tmp_path, ("save", "bare"))}]
    found = []
    for trainfix, wanted in ((False, bare), (True, entries)):
        env = stacks.environment(*folders, trainfix=trainfix)
        found += experiment.run(stacks.ROOT, wanted, trainfix=trainfix, env=env, program=PROGRAM)
    assert [result["error"] for result in found] == [None] * 3
    assert where(tmp_path) == ["out/pytorch_model/trainfix.json", "out/trainfix.json"]
    assert "TF-0501" in read(str(tmp_path / "out")).ids
    assert [line for line in found[1]["said"] if "so far" in line] == []
    assert len([line for line in found[2]["said"] if "without trainfix's repairs" in line]) == 1
