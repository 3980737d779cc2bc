"""What a checkpoint's trainfix.json says, where it is looked for, and what is said of one that is not right."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfix.environment import checkpoints
from trainfix.environment.checkpoints import NAME, Applied, CheckpointError, read

STAMP: dict[str, Any] = {
    "schema": 1,
    "trainfix": "0.1.0",
    "date": "2026-11-29T10:11:12Z",
    "packages": {"deepspeed": "0.18.9", "torch": "2.13.0+cpu"},
    "applied": [
        {"id": "TF-0001", "fix": "deepspeed.offload_accumulation", "package": "deepspeed", "shape": "ad34760dd608"},
        {"id": "TF-0004", "fix": "deepspeed.offload_accumulation", "package": "deepspeed", "shape": None},
    ],
    "states": {"TF-0013": "not-affected"},
    "partly": ["TF-0004"],
}


def stamped(folder: Path, **changes: Any) -> Path:
    """`folder`, made, with a stamp that is right but for the changes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps({**STAMP, **changes}))
    return folder


def problem(path: Path | str) -> str:
    """The words of the CheckpointError that reading `path` ends with."""
    with pytest.raises(CheckpointError) as caught:
        read(str(path))
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_stamp_says_what_was_repaired_in_which_releases(tmp_path: Path) -> None:
    found = read(str(stamped(tmp_path)))
    assert (found.trainfix, found.date) == ("0.1.0", "2026-11-29T10:11:12Z")
    assert found.file == str(tmp_path / NAME)
    assert found.packages == {"deepspeed": "0.18.9", "torch": "2.13.0+cpu"}
    assert found.applied[0] == Applied("TF-0001", "deepspeed.offload_accumulation", "deepspeed", "ad34760dd608")
    assert found.ids == {"TF-0001", "TF-0004"}
    assert found.states == {"TF-0013": "not-affected"}
    assert found.meaning == (
        "Saved on 2026-11-29 with trainfix 0.1.0, repaired: TF-0001 (deepspeed 0.18.9), TF-0004 (deepspeed 0.18.9). "
        "Only the end of the run was trained with TF-0004 repaired."
    )


def test_a_checkpoint_without_a_stamp_is_said_to_have_none_and_what_that_means(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    found = read(str(tmp_path))
    assert (found.file, found.applied, found.folder) == (None, (), str(tmp_path / "checkpoint-20"))
    assert found.meaning.startswith(f"There is no trainfix.json in {tmp_path}/checkpoint-20, so nothing shows that")
    assert "every error that its releases and its configuration reach is in these weights" in found.meaning
    assert "TRAINFIX_STAMP=0" in found.meaning


@pytest.mark.parametrize(
    ("others", "newest"),
    [
        (["checkpoint-9", "checkpoint-100", "checkpoint-20"], "checkpoint-100"),
        (["checkpoint_1", "checkpoint_12"], "checkpoint_12"),
        (["global_step5", "global_step40"], "global_step40"),
        (["checkpoint-7", "checkpoint-best", "checkpoint-8.tmp"], "checkpoint-7"),
    ],
)
def test_the_newest_checkpoint_of_a_run_is_read(others: list[str], newest: str, tmp_path: Path) -> None:
    for name in others:
        (tmp_path / name).mkdir()
    assert read(str(tmp_path)).folder == str(tmp_path / newest)
    stamped(tmp_path / newest)
    assert read(str(tmp_path)).file == str(tmp_path / newest / NAME)


def test_deepspeeds_file_names_the_checkpoint_also_below_a_trainers(tmp_path: Path) -> None:
    trainers = tmp_path / "checkpoint-6"
    stamped(trainers / "global_step6")
    stamped(trainers / "global_step9")
    (trainers / "latest").write_text("global_step6\n")
    assert read(str(tmp_path)).file == str(trainers / "global_step6" / NAME)
    stamped(trainers)
    assert read(str(tmp_path)).file == str(trainers / NAME), "the trainer's own is nearer"


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "..", "", "a\\b"])
def test_a_latest_file_that_leads_elsewhere_is_not_followed(tag: str, tmp_path: Path) -> None:
    stamped(tmp_path / "elsewhere")
    run = tmp_path / "run"
    run.mkdir()
    (run / "latest").write_text(tag)
    assert f"{run}/latest names no checkpoint beside it" in problem(run)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    for name in ("training_args.bin", "optimizer.pt", "trainfix.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Boom()))
    assert read(str(tmp_path)).file is None
    assert "is not UTF-8 text" in problem(_as_stamp(tmp_path, pickle.dumps(Boom())))
    assert not (tmp_path / "executed").exists()


def _as_stamp(folder: Path, content: bytes) -> Path:
    (folder / NAME).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "schema is 2, and this trainfix reads 1: a newer one wrote it; upgrade"),
        ({"schema": True}, "schema is True instead of 1"),
        ({"schema": "1" * 10_000}, "schema is '1111"),
        ({"schema": None}, "schema is None instead of 1"),
        ({"trainfix": 1}, "trainfix is '1', which is not a name or a version"),
        ({"date": "yesterday"}, "date is 'yesterday', which is not a date in UTC"),
        ({"packages": ["torch"]}, "packages is not an object"),
        ({"packages": {"torch": "\x1b[31m"}}, "packages.torch is '\\x1b[31m', which is not a text"),
        ({"applied": {}}, "applied is not a list"),
        ({"applied": ["TF-0001"]}, "applied has something that is not an object"),
        ({"applied": [{"id": "tf 1"}]}, "applied.id is 'tf 1', which is not the id of an advisory"),
        ({"states": {"TF-0001": 3}}, "states.TF-0001 is '3', which is not a text"),
        ({"partly": [None]}, "partly is 'None', which is not the id of an advisory"),
        ({"trainfix": "9" * 5000}, "which is not a name or a version"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_next_step(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    text = problem(stamped(tmp_path, **changes))
    assert text.startswith(f"{tmp_path}/trainfix.json is not what trainfix writes: ")
    assert words in text and len(text) < 1000
    assert "look at a copy, or remove it to have the checkpoint read as one without" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "recursion"),
        (b'{"schema": 1, "schema": 1}', "a key stands there twice"),
        (b'{"schema": NaN}', "NaN is no value of JSON"),
        (b"[]", "it is not an object"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b" " * (1 << 20) + b"{}", "is larger than 1048576 bytes: trainfix did not write it"),
    ],
)
def test_a_file_that_is_no_stamp_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    assert words in problem(_as_stamp(tmp_path, content))


def test_keys_that_a_later_release_adds_are_passed_over(tmp_path: Path) -> None:
    assert read(str(stamped(tmp_path, ranks=8))).ids == {"TF-0001", "TF-0004"}


def test_what_is_no_folder_is_refused_with_the_next_step(tmp_path: Path) -> None:
    file = tmp_path / "training_args.bin"
    file.write_bytes(b"")
    next_step = "give the folder of a checkpoint, or of a run that saved some"
    assert problem(file) == f"{file} is a file; {next_step}"
    assert problem(tmp_path / "gone") == f"{tmp_path}/gone does not exist; {next_step}"
    assert "a\\x00b" in problem("a\0b")
    assert "\\x1b[31mred does not exist" in problem(tmp_path / "\x1b[31mred")


def test_a_pipe_and_a_loop_of_links_are_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    assert f"{tmp_path}/trainfix.json is not a plain file" in problem(tmp_path)
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / NAME).symlink_to(loop / NAME)
    assert f"cannot read {loop}/trainfix.json: Too many levels of symbolic links" in problem(loop)


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_content_is_read_or_refused_in_printable_words(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    problem(_as_stamp(folder, content))
    (folder / NAME).unlink()
    (folder / "latest").write_bytes(content)
    try:
        assert read(str(folder)).file is None
    except CheckpointError as error:
        assert str(error).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(STAMP)), json_values, min_size=1))
def test_any_value_of_a_key_is_taken_or_refused(changes: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = stamped(tmp_path_factory.getbasetemp() / "values", **changes)
    try:
        assert checkpoints.read(str(folder)).meaning.isprintable()
    except CheckpointError as error:
        assert str(error).isprintable()
