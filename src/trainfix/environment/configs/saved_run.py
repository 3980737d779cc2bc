"""What a training has saved: the folder of a run or of one checkpoint, or its ``trainer_state.json`` alone.

Trainer's arguments lie there as ``training_args.bin``, a pickle, which trainfix never opens: unpickling runs what is in
it. So most stays open but what the names and the JSON of the files say. From the released sources of transformers
4.41.0 to 5.6.0 (``trainer.py``, ``trainer_callback.py``), DeepSpeed 0.14.0 to 0.19.8 (``runtime/engine.py``) and
LLaMA-Factory 0.9.5, whose web page saves the arguments as ``training_args.yaml`` too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from trainfix.environment.configs import axolotl, llamafactory, transformers, trl
from trainfix.environment.configs.documents import Document
from trainfix.environment.configs.documents import read as read_document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.values import number, written
from trainfix.environment.runconfig import Open

KIND = "saved-run"

STATE = "trainer_state.json"
PICKLE = "training_args.bin"
ARGUMENTS = ("training_args.yaml", "training_args.json")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STEP = re.compile(r"global_step(\d+)")
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_?optim_states\.pt")
_PARTITIONED = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_RANDOM = re.compile(r"rng_state(?:_(\d+))?\.pth")
_READERS = (llamafactory, axolotl, trl, transformers)
# What only Trainer's arguments say.
_ASKED = ("gradient_accumulation_steps", "label_smoothing_factor", "average_tokens_across_devices", "task")


def recognises(document: Document) -> bool:
    """Trainer's state: its counters and its log."""
    return {"global_step", "log_history"} <= document.content.keys()


def read(document: Document) -> tuple[Draft, ...]:
    """What a ``trainer_state.json`` says by itself."""
    draft = Draft(document, KIND, "launcher")
    _state(draft)
    _open(draft, f"{document.path} does not keep it")
    return (draft,)


def holds(path: str) -> bool:
    """Whether `path` is a folder that a training has saved."""
    return os.path.isdir(path) and _main(path) is not None


def read_folder(path: str) -> tuple[Draft, ...]:
    """What the folder of a run, or of one of its checkpoints, says. `path` must be one that `holds` takes."""
    folder = _main(path)
    assert folder is not None
    names = _names(folder)
    state = folder / STATE
    document = read_document(str(state)) if STATE in names else Document(str(folder), "", {})
    draft = Draft(document, KIND, "launcher")
    _state(draft)
    _ranks(draft, folder, names)
    _deepspeed(draft, folder, names)
    given = _arguments(Path(path), folder)
    where = f"{folder / PICKLE}, a pickle, which trainfix never opens" if PICKLE in names else "none of the saved files"
    _open(draft, f"it stands in {where}: give the config that the run was started with, with a second --config")
    return (*given, draft)


def _main(path: str) -> Path | None:
    """The newest checkpoint below `path`, or else `path` itself, where a training has saved something there."""
    numbered = [(int(found[1]), name) for name in _names(Path(path)) if (found := _CHECKPOINT.fullmatch(name))]
    for folder in [*(Path(path, name) for _, name in sorted(numbered, reverse=True)), Path(path)]:
        names = _names(folder)
        if {STATE, PICKLE, *ARGUMENTS} & names or any(map(_STEP.fullmatch, names)):
            return folder
    return None


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return set()


def _state(draft: Draft) -> None:
    """Trainer's own counters. They are kept by every program that trains with Trainer."""
    content = draft.document.content
    why = f"{draft.source} is written by transformers' Trainer, with which TRL, LLaMA-Factory and axolotl train too"
    draft.assumed["framework"] = Open(why)
    draft.origins["framework"] = draft.place(text=why)
    if content.get("num_train_epochs") is not None:
        draft.put("epochs", written(draft, "num_train_epochs", number), "num_train_epochs")


def _ranks(draft: Draft, folder: Path, names: set[str]) -> None:
    """Every rank saves its random state."""
    ranks = {found[1] for name in names if (found := _RANDOM.fullmatch(name))}
    if ranks == {None}:
        draft.put("ranks", 1, text=f"one rank has saved rng_state.pth ({folder})")
    elif ranks:
        count = len(ranks - {None})
        draft.put("ranks", count, text=f"{count} ranks have saved rng_state_*.pth ({folder})")


def _deepspeed(draft: Draft, folder: Path, names: set[str]) -> None:
    """Whether DeepSpeed has saved its part, and what the names of its files say."""
    steps = sorted((int(found[1]), name) for name in names if (found := _STEP.fullmatch(name)))
    if steps:
        _engine(draft, folder / steps[-1][1])
    elif "zero_to_fp32.py" in names:
        draft.put("deepspeed", True, text=f"DeepSpeed has saved zero_to_fp32.py ({folder})")
        draft.put("", Open(f"{folder} does not keep DeepSpeed's config: give it with a second --config"))
    elif {"optimizer.pt", "optimizer.bin"} & names:
        draft.put("deepspeed", False, text=f"Trainer, not DeepSpeed, has saved the optimizer ({folder})")
    else:
        why = (
            f"{folder} shows neither DeepSpeed's files nor an optimizer: give the config that the run was started with"
        )
        draft.assumed["deepspeed"] = Open(why)
        draft.origins["deepspeed"] = draft.place(text=why)


def _engine(draft: Draft, saved: Path) -> None:
    """What DeepSpeed's engine has saved: a file per rank with ZeRO, the parameters partitioned in stage 3 only."""
    names = _names(saved)
    draft.put("deepspeed", True, text=f"DeepSpeed has saved {saved}")
    draft.put("", Open(f"{saved} does not keep DeepSpeed's config: give it with a second --config"))
    optimizers = [found for name in names if (found := _OPTIMIZER.fullmatch(name))]
    key = "zero_optimization.stage"
    if any(map(_PARTITIONED.fullmatch, names)):
        draft.put(key, 3, text=f"every rank has saved its part of the parameters, as in stage 3 ({saved})")
    elif optimizers:
        why = f"{saved} looks alike in the stages 0 with bf16, 1 and 2: give DeepSpeed's config with a second --config"
        draft.put(key, Open(why))
    elif names:
        draft.put(key, 0, text=f"no rank has saved a part of the optimizer, as without ZeRO ({saved})")
    if optimizers:
        ranks = len({found[2] for found in optimizers})
        draft.put("ranks", ranks, text=f"{ranks} ranks have saved their part of the optimizer ({saved})")
        if any(found[1] for found in optimizers):
            draft.put("bf16.enabled", True, text=f"DeepSpeed has saved bf16_zero_pp_rank_* ({saved})")


def _arguments(*folders: Path) -> tuple[Draft, ...]:
    """The run's arguments, where the program has saved them as text."""
    for folder in dict.fromkeys(folders):
        for name in ARGUMENTS:
            if not (folder / name).is_file():
                continue
            document = read_document(str(folder / name))
            reader: Any = next((one for one in _READERS if one.recognises(document)), None)
            if reader is not None:
                drafts: tuple[Draft, ...] = reader.read(document)
                return drafts
    return ()


def _open(draft: Draft, why: str) -> None:
    """What only Trainer's arguments say is open, unless another file of the run says it."""
    for key in _ASKED:
        reason = f"{draft.source} does not say {key}: {why}"
        draft.assumed.setdefault(key, Open(reason))
        draft.origins.setdefault(key, draft.place(text=reason))
