"""The files that configure a run -> `RunConfig`: one module per kind of file, and how they are joined.

A reader module has `KIND`, `recognises(document)` and `read(document)`, which gives its drafts. What belongs to one run
is joined here: a program's config with the DeepSpeed config that it refers to, or that is given beside it, and with its
launcher's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from trainfix.environment.configs import deepspeed
from trainfix.environment.configs.documents import ConfigError, Document, find, read
from trainfix.environment.configs.draft import Draft
from trainfix.environment.runconfig import Open, Origin, RunConfig, shown
from trainfix.environment.runconfig.deepspeed import STEPS

__all__ = ["KINDS", "ConfigError", "holds_run", "load", "load_run"]

# Kind -> its reader module here, in the order in which they are asked; the last one takes every other JSON object.
READERS: Mapping[str, str] = MappingProxyType(
    {
        "accelerate": "accelerate",
        "llamafactory": "llamafactory",
        "axolotl": "axolotl",
        "trl": "trl",
        "saved-run": "saved_run",
        "transformers": "transformers",
        "command": "launched",
        "openrlhf": "openrlhf",
        "deepspeed": "deepspeed",
    }
)
KINDS = tuple(READERS)
_OF_TEXT = ("command", "openrlhf")


def reader(kind: str) -> Any:
    """The module that reads this kind, imported when it is first asked for: a JSON file needs no parser of shells."""
    return import_module(f"{__name__}.{READERS[kind]}")


def holds_run(folder: str) -> bool:
    """Whether a folder has the files of a saved run, which `load` reads."""
    return os.path.isdir(folder) and bool(reader("saved-run").holds(folder))


def load_run(path: str) -> RunConfig:
    """The run that one file describes, with what it refers to. Raises ConfigError."""
    return load([path])[0]


def load(paths: Sequence[str], kind: str | None = None) -> tuple[RunConfig, ...]:
    """The runs that these files describe, each file read as `kind` (default: as what it looks like).

    One program's config is joined with what is given beside it: a launcher's config, and a DeepSpeed config where it
    refers to none itself. Raises ConfigError for the first file that cannot be read.
    """
    drafts = [draft for path in dict.fromkeys(paths) for draft in _drafts(path, kind)]
    programs, launchers, configs = (
        [draft for draft in drafts if draft.role == role] for role in ("program", "launcher", "deepspeed")
    )
    followed = {draft: _referred(draft) for draft in [*programs, *launchers]}
    taken = {_place(one.source) for one in followed.values() if one is not None}
    configs = [one for one in configs if _place(one.source) not in taken]
    alone: list[tuple[Draft | None, ...]] = [(one, followed[one]) for one in launchers] + [(one,) for one in configs]
    if len(programs) != 1:  # nobody can say which launcher or config belongs to which program
        own = [run for program in programs for run in _of_one(program, [], [], followed)]
        return (*own, *map(_joined, alone))
    return tuple(_of_one(programs[0], launchers, configs, followed))


def _place(path: str) -> str:
    """The one name of a file, or of what names none."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return path


def _of_one(
    program: Draft, launchers: Sequence[Draft], configs: Sequence[Draft], followed: dict[Draft, Draft | None]
) -> Iterator[RunConfig]:
    """The runs of one program: under each launcher, with each DeepSpeed config that there is."""
    started_by: Sequence[Draft | None] = launchers or [_launcher(program)]
    joins = followed[program] is None
    for launcher in started_by:
        config = followed[program] or (followed.get(launcher) or _referred(launcher) if launcher is not None else None)
        joins = joins and config is None
        beside: Sequence[Draft | None] = configs if config is None and configs else [config]
        for one in beside:
            yield _joined((program, one, launcher))
    if not joins:
        yield from (_joined((one,)) for one in configs)


def _joined(parts: Sequence[Draft | None]) -> RunConfig:
    """One run from its parts. The DeepSpeed config decides first, then the program, then the launcher."""
    found = [part for part in parts if part is not None]
    order = sorted(found, key=lambda part: ("deepspeed", "program", "launcher").index(part.role))
    values: dict[str, object] = {}
    origins: dict[str, Origin] = {}

    configured = any(part.role == "deepspeed" for part in found)

    def take(part: Draft, offered: Mapping[str, object], wanted: Callable[[str], bool]) -> None:
        # That another part leaves DeepSpeed's config open as a whole counts only where there is none.
        whole = not configured or part.role == "deepspeed"
        new = {key: value for key, value in offered.items() if wanted(key) and (key or whole)}
        values.update(new)
        origins.update({key: part.origins[key] for key in new})

    for part in order:
        take(part, part.values, lambda key: values.get(key, "auto") == "auto")
    for part in order:
        take(part, part.fills, lambda key: values.get(key) == "auto")
    for part in order:
        take(part, part.assumed, lambda key: key not in values)
    steps = values.get(STEPS)
    if configured and not {STEPS, ""} & order[0].values.keys() and steps not in (None, 1):
        why = f"{STEPS} is not set ({order[0].source}): accelerate then takes 1 there"
        values[STEPS] = Open(f'{why}, whatever the trainer does ({order[1].source}: {shown(steps)}); set it to "auto"')
    chosen = values.get("deepspeed")
    if isinstance(chosen, Open):  # nor can anybody say, then, what its config would be
        values.setdefault("", chosen)
        origins.setdefault("", origins["deepspeed"])
    source = " + ".join(dict.fromkeys(part.source for part in found))
    return RunConfig(source, MappingProxyType(values), MappingProxyType(origins))


def _drafts(path: str, kind: str | None) -> Sequence[Draft]:
    """What one file, or the folder of a saved run, says, read as `kind`, or as the first kind that recognises it."""
    if kind in (None, "saved-run") and holds_run(path):
        of_folder: Sequence[Draft] = reader("saved-run").read_folder(path)
        return of_folder
    document = read(path)
    asked = [one for one in KINDS if one not in _OF_TEXT or not document.content] if kind is None else [kind]
    for one in asked:
        if kind is not None or reader(one).recognises(document):
            drafts: Sequence[Draft] = reader(one).read(document)
            return drafts
    raise ConfigError(
        f"{path} looks like no config that trainfix knows ({', '.join(KINDS)}); name the file that the run uses, or "
        "say what it is with --kind"
    )


def _referred(draft: Draft) -> Draft | None:
    """The DeepSpeed config that this one refers to, read; all of it open where it is not there."""
    if draft.deepspeed is None:
        return None
    if isinstance(draft.deepspeed, Draft):
        return draft.deepspeed
    if isinstance(draft.deepspeed, dict):
        return deepspeed.inside(draft.document, draft.deepspeed, "deepspeed")
    file = find(draft.deepspeed, draft.source)
    if file is not None:
        (config,) = deepspeed.read(read(file))
        return config
    why = f"deepspeed = {draft.deepspeed} ({draft.source}): no such file here, beside it or above it"
    missing = Draft(Document(draft.deepspeed, "", {}), deepspeed.KIND, "deepspeed")
    missing.values = {"deepspeed": True, "": Open(why)}
    missing.origins = dict.fromkeys(missing.values, replace(draft.place("deepspeed"), text=why))
    return missing


def _launcher(program: Draft) -> Draft | None:
    """The launcher's config that a program's refers to."""
    if program.accelerate is None or isinstance(program.accelerate, Draft):
        return program.accelerate
    file = find(program.accelerate, program.source)
    if file is None:
        raise ConfigError(
            f"{program.source}: it names the accelerate config {program.accelerate}, and there is no such file here, "
            "beside it or above it"
        )
    launcher: Draft
    (launcher,) = reader("accelerate").read(read(file))
    return launcher
