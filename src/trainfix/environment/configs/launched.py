"""Commands in a script that start a training: with transformers' Trainer, TRL, LLaMA-Factory, axolotl or OpenRLHF.

The arguments on the command line are read as that program's config is, over the config file that the command names:
``llamafactory-cli train x.yaml key=value``, ``accelerate launch ... train.py --gradient_accumulation_steps 8``,
``axolotl train x.yml``, ``trl sft --config x.yaml``, ``deepspeed train.py --deepspeed ds.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainfix.environment.configs import accelerate, axolotl, llamafactory, openrlhf, transformers, trl
from trainfix.environment.configs.commands import Command, Flag, commands, hidden, ranks
from trainfix.environment.configs.documents import ConfigError, Document, find
from trainfix.environment.configs.documents import read as read_document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.shell import is_literal, may_be_many
from trainfix.environment.configs.values import whole, written
from trainfix.environment.runconfig import Open, Origin

KIND = "command"

_TRL_TASKS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")
# Example scripts of transformers with Trainer.
_EXAMPLES = re.compile(
    r"run_(clm|fim|mlm|plm|glue|xnli|qa|seq2seq_qa|swag|summarization|translation|ner|classification|audio_classification|"
    r"image_classification|speech_recognition_ctc|speech_recognition_seq2seq|semantic_segmentation)"
)
_DATA = (".yaml", ".yml", ".json")
# Flags that may stand without a value: a variable after one of them may hold any flag.
_TRUTHS = frozenset(
    """
    bf16 do_eval do_train fp16 gradient_checkpointing group_by_length load_best_model_at_end overwrite_output_dir
    packing tf32 use_peft
    """.split()
)
# Arguments that Trainer has, and the examples with a loop of their own have not.
_TRAINER_ONLY = frozenset(
    """
    dataloader_num_workers ddp_timeout do_eval do_train eval_steps eval_strategy evaluation_strategy
    gradient_checkpointing load_best_model_at_end logging_steps logging_strategy overwrite_output_dir
    remove_unused_columns save_steps save_strategy save_total_limit tf32 warmup_ratio
    """.split()
)
# accelerate launch's options that its config has in deepspeed_config, beside those of accelerate.SECTION.
_SECTION = frozenset((*accelerate.SECTION, "deepspeed_config_file"))


@dataclass(frozen=True)
class _Given:
    """What a command line holds: values by argument, the line of each, and words that may hold more arguments."""

    content: Mapping[str, object]
    lines: Mapping[tuple[str, ...], int]
    free: tuple[str, ...]


@dataclass(frozen=True)
class _Training:
    """A command that trains. reader: of its arguments; named: the config that it names; base: that one, if found."""

    command: Command
    given: _Given
    reader: Any
    named: str | None
    base: Document | None


def recognises(document: Document) -> bool:
    """Text with a command that starts a training, or that is launched as one and not told by the script."""
    if document.content or document.path.lower().endswith(_DATA):
        return False
    try:
        found = commands(document)
    except ConfigError:
        return False
    others = [command for command in found if not openrlhf.program(command)]
    try:
        trains = any(_training(document, command) for command in others)
    except ConfigError:
        return True  # the config that it names cannot be read, which `read` says
    return trains or hidden([command for command in others if command.launcher != "python"]) is not None


def read(document: Document) -> tuple[Draft, ...]:
    """A draft of each training that the script starts. Raises ConfigError where it starts none."""
    found = commands(document)
    drafts: list[Draft] = []
    for command in found:
        training = _training(document, command)
        if openrlhf.program(command):
            drafts.extend(openrlhf.drafted(document, command))
        elif training is not None:
            drafts.append(_drafted(document, training))
    if not drafts:
        raise ConfigError(
            hidden(found)
            or f"{document.path} starts no training that trainfix knows (torchrun, deepspeed, accelerate launch, "
            "llamafactory-cli, axolotl, trl, openrlhf); name the script or the config of the training"
        )
    return tuple(drafts)


def _training(document: Document, command: Command) -> _Training | None:
    """What a command trains, None if nothing."""
    given = _given(command)
    reader = _reader(command, given.content)
    named = _config(command, given)
    file = None if named is None else find(named, document.path)
    base = None if file is None else read_document(file)
    if base is not None and reader in (None, transformers, _OWN_LOOP):
        reader = next((one for one in (llamafactory, axolotl, trl, transformers) if one.recognises(base)), reader)
    return None if reader is None else _Training(command, given, reader, named, base)


def _drafted(document: Document, training: _Training) -> Draft:
    """The draft of one command, over the config that it names."""
    given, base = training.given, training.base
    if training.named is not None and base is None:
        return _missing(document, training, training.named)
    if base is None:
        joined = Document(document.path, document.text, given.content, given.lines)
    else:
        joined = replace(base, content={**base.content, **given.content}, lines={**base.lines, **given.lines})
    draft: Draft = _own_loop(joined) if training.reader is _OWN_LOOP else training.reader.read(joined)[0]
    if base is not None:
        _attribute(draft, given, document.path)
    _say_program(draft, training)
    if given.free:
        _leave_open(draft, f"but {given.free[0]} in {document.path} may hold it")
    elif training.reader is transformers and not _is_trainer(training, joined):
        _leave_open(draft, f"and {training.command.program} may choose it itself")
    _launch(draft, training.command, document)
    return draft


# What the command line holds


def _given(command: Command) -> _Given:
    content: dict[str, object] = {}
    lines: dict[tuple[str, ...], int] = {}
    free = [word for word in command.words if not is_literal(word) and "=" not in word]
    for word in command.words:
        name, equals, value = word.partition("=")
        if equals and command.launcher == "llamafactory-cli":
            content[name] = None if value == "null" else value
            lines[(name,)] = command.line
    for flag in command.flags:
        name = flag.name.lstrip("-").replace("-", "_")
        content[name], extra = _value(name, flag)
        lines[(name,)] = flag.line
        free.extend(extra)
    return _Given(content, lines, tuple(free))


def _value(name: str, flag: Flag) -> tuple[object, tuple[str, ...]]:
    """A flag's value, and the words after it that may hold other flags."""
    first = flag.values[0] if flag.values else ""
    taken = 0 if may_be_many(first) or (name in _TRUTHS and not is_literal(first)) else 1
    extra = tuple(word for word in flag.values[taken:] if not is_literal(word))
    values = flag.values[:taken] if extra else flag.values
    if not values:
        return True, extra
    return (values[0] if len(values) == 1 else list(values)), extra


def _config(command: Command, given: _Given) -> str | None:
    """The config file that a command names for the program itself."""
    words = command.words[1:] if command.launcher in ("llamafactory-cli", "axolotl") else command.words
    if words and words[0].lower().endswith(_DATA):
        return words[0]
    named = given.content.get("config")
    return named if isinstance(named, str) and named.lower().endswith(_DATA) else None


# Whose training it is


# A training loop that is not transformers' Trainer, as far as the command line shows.
_OWN_LOOP: Any = object()


def _reader(command: Command, content: Mapping[str, object]) -> Any:
    """The reader for the arguments of what a command starts; None if they show no training."""
    first = command.words[0] if command.words else ""
    if command.launcher == "llamafactory-cli" or command.program in ("llamafactory.cli", "llamafactory.launcher"):
        return llamafactory if first == "train" else None
    if command.launcher == "axolotl":
        return axolotl if first == "train" else None
    if command.launcher == "trl":
        return trl if first in _TRL_TASKS else None
    if command.program == "axolotl.cli.train":
        return axolotl
    if not command.is_named:
        return None
    if llamafactory.recognises(Document(command.file, "", content)):
        return llamafactory
    if "trl" in command.program.replace(".", "/").split("/"):
        return trl
    if len(transformers.DISTINCTIVE & content.keys()) >= 2:
        return transformers
    uses = {"deepspeed", "deepspeed_config", "gradient_accumulation_steps"} & content.keys()
    configured = command.launcher == "accelerate" and {"config_file", "use_deepspeed"} & command.options.keys()
    return _OWN_LOOP if uses or configured else None


def _own_loop(document: Document) -> Draft:
    """What the arguments of an unknown program mean by their names; nothing is assumed where they are absent."""
    draft = Draft(document, KIND, "program")
    if "gradient_accumulation_steps" in document.content:
        key = "gradient_accumulation_steps"
        draft.put(key, written(draft, key, whole), key)
    config = document.content.get("deepspeed_config") or document.content.get("deepspeed")
    if isinstance(config, str):
        draft.deepspeed = config
    else:
        draft.assume("deepspeed", Open(f"{document.path} names no DeepSpeed config: the program may"), "it")
    return draft


def _is_trainer(training: _Training, document: Document) -> bool:
    """Whether the arguments are surely those of transformers' own parser, whose defaults then hold."""
    example = _EXAMPLES.fullmatch(_stem(training.command))
    return example is not None or len(_TRAINER_ONLY & document.content.keys()) >= 2


def _stem(command: Command) -> str:
    """The program's name without its folder and ending."""
    return command.program.removesuffix(".py").replace(".", "/").rpartition("/")[2]


def _say_program(draft: Draft, training: _Training) -> None:
    """What only the command tells: its program, and TRL's task."""
    command, reader = training.command, training.reader
    stem = _stem(command)
    if reader is transformers and _EXAMPLES.fullmatch(stem):
        text = f"{command.program} ({command.place}) is an example of transformers"
        _tell(draft, command, "framework", "transformers", text)
    elif reader in (transformers, _OWN_LOOP):
        why = f"{command.program} ({command.place}) decides whether transformers' Trainer trains, TRL's or its own loop"
        _tell(draft, command, "framework", Open(why))
        _tell(draft, command, "task", Open(f"{command.program} ({command.place}) decides the kind of training"))
    else:
        _tell(
            draft, command, "framework", reader.KIND, f"{command.program} ({command.place}) trains with {reader.KIND}"
        )
    task = command.words[0] if command.launcher == "trl" else stem
    if reader is trl and task in _TRL_TASKS:
        _tell(draft, command, "task", task, f"{command.program} {task} ({command.place})")


def _tell(draft: Draft, command: Command, key: str, value: object, text: str = "") -> None:
    """`key` is `value`, as the command says, not the config that it names."""
    draft.values[key] = value
    draft.origins[key] = Origin(command.file, key, command.line, text)


def _missing(document: Document, training: _Training, named: str) -> Draft:
    """The draft of a run whose config is not there."""
    draft = Draft(document, KIND, "program")
    _say_program(draft, training)
    why = f"{named} ({training.command.place}): no such file here, beside it or above it"
    for key in ("deepspeed", "gradient_accumulation_steps", ""):
        draft.put(key, Open(why))
    _launch(draft, training.command, document)
    return draft


def _attribute(draft: Draft, given: _Given, script: str) -> None:
    """Says of values from the command line that they stand there, and not in the config that it names."""
    config = f"({draft.source})"
    for key, origin in draft.origins.items():
        name = origin.key.partition(".")[0]
        if (name,) not in given.lines:
            continue
        text = origin.text.replace(config, f"({script})")
        draft.origins[key] = Origin(script, origin.key, given.lines[(name,)], text)
        for values in (draft.values, draft.fills, draft.assumed):
            value = values.get(key)
            if isinstance(value, Open):
                values[key] = Open(value.why.replace(config, f"({script})"))


def _leave_open(draft: Draft, why: str) -> None:
    """Nothing is assumed of what the command line may still hold."""
    for values in (draft.assumed, draft.fills):
        for key, value in values.items():
            if draft.origins[key].line is None and not isinstance(value, Open):
                values[key] = Open(f"{key} is not set ({draft.source}), {why}")


# How it is launched


def _launch(draft: Draft, command: Command, document: Document) -> None:
    """The ranks, and accelerate's part."""
    if command.launcher in ("axolotl", "trl"):
        return  # they start accelerate launch, with what their own config says
    count, text = ranks(command)
    if command.launcher != "accelerate":
        _tell(draft, command, "ranks", count, f"{text} ({command.place})")
        if isinstance(draft.assumed.get("deepspeed"), Open):  # accelerate's own config has no part in it
            why = f"--deepspeed is not given ({command.place}), but {command.program} may choose DeepSpeed itself"
            draft.assumed["deepspeed"] = Open(why)
        return
    if not isinstance(count, Open):
        _tell(draft, command, "ranks", count, f"{text} ({command.place})")
    draft.accelerate = _accelerate(command, document)


def _accelerate(command: Command, document: Document) -> Draft | None:
    """The draft of accelerate's config: the file that it names, under the options of ``accelerate launch``."""
    options = {name: value for name, value in command.options.items() if name in (*_SECTION, "mixed_precision")}
    named = command.options.get("config_file")
    file = None if named is None else find(named, document.path)
    content: dict[str, object] = {} if file is None else dict(read_document(file).content)
    if named is not None and file is None:
        launcher = Draft(document, accelerate.KIND, "launcher")
        why = f"--config_file {named} ({command.place}): no such file here, beside it or above it"
        for key in ("deepspeed", "ranks", ""):
            launcher.put(key, Open(why))
        return launcher
    if file is None and "use_deepspeed" not in command.options:
        return None
    if "use_deepspeed" in command.options:
        content["distributed_type"] = "DEEPSPEED"
    if "num_processes" in command.options:
        content["num_processes"] = command.options["num_processes"]
    if "mixed_precision" in options:
        content["mixed_precision"] = options.pop("mixed_precision")
    section = content.get("deepspeed_config")
    content["deepspeed_config"] = {**(section if isinstance(section, dict) else {}), **options}
    path = document.path if file is None else file
    (draft,) = accelerate.read(Document(path, document.text if file is None else "", content))
    return draft
