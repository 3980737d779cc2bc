"""Stamps: a checkpoint of a repaired run carries what it was trained with, in a `trainfix.json` beside its files.

A stamp post is a wrapped method that saves or loads a checkpoint. Like a guard it stands only while something is
repaired, and the engine takes it out again. After a save it writes the stamp; after a load it compares the stamp with
what is repaired now, and warns once per process. Nothing that goes wrong here reaches the run.

What it cannot see: a repair that `trainfix.apply` puts in place in the middle of a run counts for all of it.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import trainfix
from trainfix.engine import replace, report
from trainfix.engine.contract import Function
from trainfix.environment.checkpoints import HEALTHY, NAME, SCHEMA, Stamp, places, stamp_in
from trainfix.environment.printable import printable

if TYPE_CHECKING:
    from trainfix.engine.status import Record

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A method that saves or loads a checkpoint. `folders` gets the call's arguments by name and its result: where to
    write the stamp, or, of a load, where to look for it, nearest first; none if nothing was saved or loaded."""

    path: str
    folders: Callable[[Arguments, Any], Iterable[str | Path]]
    loads: bool = False

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]


def _tag_folder(call: Arguments, saved: Any) -> list[Path]:
    tag = call["tag"] if call["tag"] is not None else f"global_step{call['self'].global_steps}"
    return [Path(call["save_dir"], str(tag))]


def _loaded_tag(call: Arguments, loaded: Any) -> list[Path]:
    """transformers and accelerate, which call the engine, leave theirs one folder higher."""
    path = loaded[0]
    if path is None or call["load_module_only"]:  # weights to begin with are no run that goes on
        return []
    folder = Path(path).parent if isinstance(path, str) else Path(call["load_dir"], str(call["tag"]))
    return [folder, folder.parent]


def _trainers_folder(call: Arguments, saved: Any) -> list[str]:
    return [call["output_dir"] or call["self"].args.output_dir]


def _numbered_folder(call: Arguments, saved: Any) -> list[Path]:
    trainer = call["self"]
    return [Path(trainer._get_output_dir(trial=call["trial"]), f"checkpoint-{trainer.state.global_step}")]


def _resumed_folder(call: Arguments, loaded: Any) -> Iterable[Path]:
    return places(Path(call["checkpoint"])) if call["checkpoint"] is not None else []


def _named_folder(call: Arguments, loaded: Any) -> Iterable[Path]:
    accelerator, named = call["self"], call["input_dir"]
    return places(Path(os.path.expanduser(named) if named else Path(accelerator.project_dir, "checkpoints")))


_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine."
_TRAINER = "transformers.trainer:Trainer."
_ACCELERATOR = "accelerate.accelerator:Accelerator."
_STRATEGY = "openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy."

DEEPSPEED = (
    Place(_ENGINE + "save_checkpoint", _tag_folder),
    Place(_ENGINE + "load_checkpoint", _loaded_tag, loads=True),
)
TRAINER = (
    Place(_TRAINER + "save_model", _trainers_folder),
    # It calls save_model, but not where a subclass has its own, and with FSDP's shards that writes nothing.
    Place(_TRAINER + "_save_checkpoint", _numbered_folder),
    # Called whenever a training is resumed; `_load_from_checkpoint` is not, under DeepSpeed.
    Place(_TRAINER + "_load_optimizer_and_scheduler", _resumed_folder, loads=True),
)
ACCELERATOR = (
    Place(_ACCELERATOR + "save_state", lambda call, saved: [saved]),
    Place(_ACCELERATOR + "load_state", _named_folder, loads=True),
)
STRATEGY = (Place(_STRATEGY + "save_model", lambda call, saved: [call["output_dir"]]),)

# A repaired package -> through what its runs save and load.
PLACES: dict[str, tuple[Place, ...]] = {
    "deepspeed": DEEPSPEED,
    "accelerate": ACCELERATOR + DEEPSPEED,
    "transformers": TRAINER,
    "trl": TRAINER,
    "llamafactory": TRAINER + DEEPSPEED,
    "openrlhf": STRATEGY + DEEPSPEED,
}
_OF_OTHERS = TRAINER + ACCELERATOR + DEEPSPEED  # a package that third parties repair may use any of them


def of_packages(packages: Iterable[str]) -> list[Place]:
    """The places through which runs of these packages save and load, each once."""
    found = {place.path: place for package in packages for place in PLACES.get(package, _OF_OTHERS)}
    return list(found.values())


def parts(whole: Any) -> list[Any]:
    """The object that saves or loads, and those of its parts that a repair may look after: accelerate's wrapper of the
    engine, the engine, and the engine's optimizer."""
    wrapper = getattr(getattr(whole, "accelerator", whole), "deepspeed_engine_wrapped", None)
    engine = getattr(wrapper, "engine", whole)
    found = (whole, wrapper, engine, getattr(engine, "optimizer", None))
    return list({id(part): part for part in found if part is not None}.values())


@dataclass
class Posts:
    """The methods that are watched. `account`: a record of every advisory that was decided on, and the versions of the
    imported packages. `looked_after`: the harmful advisories of the fixes that look after one of these objects."""

    account: Callable[[], tuple[Sequence[Record], Mapping[str, str]]]
    looked_after: Callable[[Sequence[Any]], Collection[str]]
    _active: frozenset[str] = frozenset()
    _journal: dict[str, list[replace.Entry]] = field(default_factory=dict)
    _partly: WeakKeyDictionary[Any, frozenset[str]] = field(default_factory=WeakKeyDictionary)
    _told: bool = False

    def stand(self, wanted: Sequence[Place]) -> None:
        """Watch exactly these. One that somebody has wrapped since cannot be taken out; it does nothing then."""
        self._active = frozenset(place.path for place in wanted)
        self.aside([path for path in self._journal if path not in self._active])
        for place in wanted:
            try:
                slot, live = replace.inner_slot(*replace.resolve(place.path))
                journal = self._journal.setdefault(place.path, [])
                if not any(replace.leads_to(live, entry.replacement, slot.owner) for entry in journal):
                    journal += replace.put(place.path, self._wrap(place, live))
            except Exception as error:
                report.warn(f"trainfix: checkpoints will not be stamped at {place.path}: {error}")

    def aside(self, paths: Iterable[str]) -> None:
        """Make way at these paths, for a guard that comes or goes there. `stand` puts the posts back."""
        for path in paths:
            journal = self._journal.get(path, [])
            removed = [entry for entry in journal if entry.holder() is None]
            replace.take_out(removed)
            self._journal[path] = [entry for entry in journal if entry not in removed]

    def _wrap(self, place: Place, original: Function) -> Function:
        @wraps(original)
        def watched(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            after(place, original, result, self, *args, **named)
            return result

        after = self._after
        return watched

    def _after(self, place: Place, original: Function, result: Any, whole: Any, *args: Any, **named: Any) -> None:
        if place.path not in self._active or not _is_first_rank():
            return
        try:
            call = inspect.signature(original).bind(whole, *args, **named)
            call.apply_defaults()
            folders = place.folders(call.arguments, result)
            if place.loads:
                self._compare(whole, folders)
            else:
                self._save(whole, folders)
        except Exception as error:
            what = "whether the run so far was trained alike cannot be told" if place.loads else f"no {NAME} is written"
            report.warn(f"trainfix: {what} ({place.path}): {type(error).__name__}: {printable(str(error))}")

    def _save(self, whole: Any, folders: Iterable[str | Path]) -> None:
        records, packages = self.account()
        partly = frozenset[str]().union(*(self._partly.get(part, ()) for part in filter(_is_weak, parts(whole))))
        for folder in map(Path, folders):
            if folder.is_dir():  # else nothing was saved there
                write(folder, contents(records, packages, partly))

    def _compare(self, whole: Any, folders: Iterable[str | Path]) -> None:
        cared_for = set(self.looked_after(parts(whole)))
        if not cared_for:
            return
        folder, stamp = None, None
        for folder in map(Path, folders):
            stamp = stamp_in(folder)
            if stamp is not None:
                break
        if folder is None:
            return
        records = [record for record in self.account()[0] if record.id in cared_for]
        lacking, text = difference(stamp or Stamp(str(folder)), records)
        for part in filter(_is_weak, parts(whole)):
            self._partly[part] = lacking
        if text is not None and not self._told:
            self._told = True
            report.warn(text)


def contents(records: Sequence[Record], packages: Mapping[str, str], partly: Collection[str] = ()) -> dict[str, Any]:
    """What the stamp says; see `trainfix.environment.checkpoints.Stamp`."""
    applied = [record for record in records if record.state == "applied"]
    return {
        "schema": SCHEMA,
        "trainfix": trainfix.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "packages": dict(sorted(packages.items())),
        "applied": [{"id": one.id, "fix": one.fix, "package": one.package, "shape": one.shape} for one in applied],
        "states": {one.id: one.state for one in records if one not in applied},
        "partly": sorted(one.id for one in applied if one.id in partly),
    }


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Put the stamp into `folder`, whole or not at all. Raises OSError."""
    unfinished = folder / f".{NAME}.{os.getpid()}"
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(folder / NAME)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def difference(stamp: Stamp, records: Sequence[Record]) -> tuple[frozenset[str], str | None]:
    """The advisories that are repaired now, and that the run so far was not; and what to say about it, or None.

    One that did not need a repair, then or now, makes no difference.
    """
    now = {record.id for record in records if record.state == "applied"}
    healthy = {id for id, state in stamp.states.items() if state in HEALTHY}
    lacking = now - (stamp.ids - set(stamp.partly)) - healthy
    gone = {one.id: one for one in records if one.id in stamp.ids and one.state not in ("applied", *HEALTHY)}
    head = f"trainfix {trainfix.__version__}: the run so far was trained"
    new = _list_of(lacking)
    if stamp.file is None:
        text = (
            f"{head} without trainfix's repairs (no {NAME} in {printable(stamp.folder)}, which TRAINFIX_STAMP=0 would "
            f"explain too). It goes on with {new} repaired, so its steps are not all alike"
        )
        return frozenset(lacking), f"{text}: {_next_step(lacking)}" if lacking else None
    then = [f"{id} was repaired and is not any more ({one.state}: {one.reason})" for id, one in sorted(gone.items())]
    then += [f"it goes on with {new} repaired, and was not from the start"] if lacking else []
    text = f"{head} with other repairs ({printable(stamp.file or '')}): {'; '.join(then)}"
    return frozenset(lacking), f"{text}: {_next_step({*lacking, *gone})}" if then else None


def _next_step(ids: Collection[str]) -> str:
    return f"`trainfix show {min(ids)}` says what that means; only a run from the start is trained alike throughout."


def _list_of(ids: Collection[str]) -> str:
    return ", ".join(sorted(ids))


def _is_weak(part: Any) -> bool:
    """Whether a weak dictionary can have it as a key."""
    return hasattr(type(part), "__weakref__") and type(part).__hash__ is not None


def _is_first_rank() -> bool:
    """By torch's group where there is one: ranks that no launcher started have no variables that tell them apart."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return report.is_first_rank()
