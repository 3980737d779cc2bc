"""What a checkpoint says about how its run was trained: the `trainfix.json` that a repaired trainer leaves in it.

Nothing is unpickled: `training_args.bin` and ``.pt`` files are not even opened.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainfix.environment.printable import printable

NAME = "trainfix.json"
SCHEMA = 1
HEALTHY = frozenset({"not-affected", "fixed-upstream", "fixed-by-source-patch"})

_MOST_BYTES = 1 << 20
_LATEST_BYTES = 4096
_LONGEST = 200  # characters of one text
# What transformers (checkpoint-20), accelerate (checkpoint_20) and DeepSpeed (global_step20) call their checkpoints.
_NUMBERED = re.compile(r"(?:checkpoint-|checkpoint_|global_step)(\d{1,18})")
_ID = re.compile(r"[A-Z][A-Z0-9]*-\d{1,9}")
_WORD = re.compile(r"[\w.!+-]+", re.ASCII)
_PRINTABLE = re.compile(r"[ -~]+")


class CheckpointError(Exception):
    """A checkpoint cannot be read, or its trainfix.json is none. The message names the file and the next step."""


@dataclass(frozen=True)
class Applied:
    """One advisory that was repaired when the checkpoint was saved. `shape` is that of the deciding function."""

    id: str
    fix: str
    package: str
    shape: str | None


@dataclass(frozen=True)
class Stamp:
    """What is known of the run that left a checkpoint. `file` is None where there is no trainfix.json in `folder`.

    `packages`: package -> version. `states`: advisory -> its state, of those that were not applied (``fixed-upstream``,
    ``disabled``, ...). `partly`: the applied ones with which only the end of the run was trained: it went on from a
    checkpoint that was saved without them. `date`: UTC, ISO 8601.
    """

    folder: str
    file: str | None = None
    trainfix: str = ""
    date: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    applied: tuple[Applied, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    partly: tuple[str, ...] = ()

    @property
    def ids(self) -> frozenset[str]:
        """The advisories that were repaired."""
        return frozenset(one.id for one in self.applied)

    @property
    def meaning(self) -> str:
        """What that means, in one or two sentences for a person."""
        if self.file is None:
            return (
                f"There is no {NAME} in {printable(self.folder)}, so nothing shows that its run was trained with "
                "trainfix's repairs. Either it was not, and every error that its releases and its configuration reach "
                "is in these weights, or it was under TRAINFIX_STAMP=0."
            )
        head = f"Saved on {self.date[:10]} with trainfix {self.trainfix}"
        if not self.applied:
            return f"{head}, when nothing was repaired."
        found = ", ".join(
            f"{one.id} ({one.package} {self.packages.get(one.package, 'of unknown version')})" for one in self.applied
        )
        rest = f" Only the end of the run was trained with {', '.join(self.partly)} repaired." if self.partly else ""
        return f"{head}, repaired: {found}.{rest}"


def read(path: str) -> Stamp:
    """What the checkpoint in the folder `path` says, or the newest checkpoint of a run in that folder.

    Looks for trainfix.json in the folder, in the one that DeepSpeed's file `latest` names, and in the ``checkpoint-N``,
    ``checkpoint_N`` or ``global_stepN`` with the highest N. Raises CheckpointError.
    """
    folder = Path(path)
    try:
        is_folder = folder.is_dir()
        exists = is_folder or folder.exists()
    except (OSError, ValueError) as error:  # a loop of links, a null byte
        raise CheckpointError(f"cannot look into {printable(path)}: {error}; give a checkpoint's folder") from error
    if not is_folder:
        what = "is a file" if exists else "does not exist"
        raise CheckpointError(f"{printable(path)} {what}; give the folder of a checkpoint, or of a run that saved some")
    last = folder
    for last in places(folder):
        stamp = stamp_in(last)
        if stamp is not None:
            return stamp
    return Stamp(str(last))


def places(folder: Path) -> Iterator[Path]:
    """The folders in which the stamp of a checkpoint, or of a run's newest checkpoint, may lie, nearest first."""
    inner: Path | None = folder
    for _ in range(3):  # run / checkpoint-20 / global_step20
        if inner is None:
            return
        yield inner
        inner = _newest(inner)


def stamp_in(folder: Path) -> Stamp | None:
    """The stamp in this very folder, None if there is none. Raises CheckpointError if it is not a right one."""
    file = folder / NAME
    text = _text(file, _MOST_BYTES)
    if text is None:
        return None
    try:
        return _stamp(file, json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant))
    except (ValueError, RecursionError) as error:
        reason = printable(str(error)[: 2 * _LONGEST])
        raise CheckpointError(
            f"{printable(str(file))} is not what trainfix writes: {reason}; it was changed or damaged, so it says "
            "nothing about the run: look at a copy, or remove it to have the checkpoint read as one without"
        ) from error


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`: the one that DeepSpeed's `latest` names, or with the highest number."""
    latest = folder / "latest"
    tag = _text(latest, _LATEST_BYTES)
    if tag is not None:
        tag = tag.strip()
        if tag in ("", ".", "..") or "/" in tag or "\\" in tag or "\0" in tag:
            raise CheckpointError(
                f"{printable(str(latest))} names no checkpoint beside it: {printable(tag)[:_LONGEST]!r}"
            )
        return folder / tag
    try:
        found = [(int(match[1]), name) for name in os.listdir(folder) if (match := _NUMBERED.fullmatch(name))]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"cannot look into {printable(str(folder))}: {error.strerror}; make it readable"
        ) from error
    return folder / max(found)[1] if found else None


def _text(file: Path, most: int) -> str | None:
    """The text of a plain file of at most `most` bytes, None if there is none. Raises CheckpointError."""
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe must not make us wait
        with open(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise CheckpointError(f"{printable(str(file))} is not a plain file; give a checkpoint's folder")
            content = stream.read(most + 1)
        if len(content) > most:
            raise CheckpointError(f"{printable(str(file))} is larger than {most} bytes: trainfix did not write it")
        return content.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CheckpointError(
            f"cannot read {printable(str(file))}: {reason}; make it readable, or remove it"
        ) from error


def _stamp(file: Path, found: Any) -> Stamp:
    """Raises ValueError, which says which key is wrong."""
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    schema = found.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise ValueError(f"schema is {schema}, and this trainfix reads {SCHEMA}: a newer one wrote it; upgrade")
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"schema is {schema!r} instead of {SCHEMA}")
    return Stamp(
        folder=str(file.parent),
        file=str(file),
        trainfix=_word(found.get("trainfix"), "trainfix"),
        date=_date(found.get("date")),
        packages=_words(found.get("packages"), "packages"),
        applied=tuple(_applied(one) for one in _list(found.get("applied"), "applied")),
        states={_id(id, "states"): state for id, state in _words(found.get("states"), "states").items()},
        partly=tuple(_id(one, "partly") for one in _list(found.get("partly"), "partly")),
    )


def _applied(one: Any) -> Applied:
    if not isinstance(one, dict):
        raise ValueError("applied has something that is not an object")
    shape = one.get("shape")
    return Applied(
        id=_id(one.get("id"), "applied.id"),
        fix=_word(one.get("fix"), "applied.fix"),
        package=_word(one.get("package"), "applied.package"),
        shape=None if shape is None else _word(shape, "applied.shape"),
    )


def _matching(pattern: re.Pattern[str], value: Any, key: str, kind: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST or not pattern.fullmatch(value):
        raise ValueError(f"{key} is {str(value)[:_LONGEST]!r}, which is not {kind}")
    return value


def _word(value: Any, key: str) -> str:
    return _matching(_WORD, value, key, "a name or a version")


def _id(value: Any, key: str) -> str:
    return _matching(_ID, value, key, "the id of an advisory")


def _date(value: Any) -> str:
    return _matching(re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII), value, "date", "a date in UTC")


def _words(value: Any, key: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    return {_word(name, key): _matching(_PRINTABLE, text, f"{key}.{name}", "a text") for name, text in value.items()}


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")
