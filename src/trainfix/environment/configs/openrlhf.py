"""OpenRLHF's command lines, in a shell script or alone: the old flat flags, and those with sections since 0.10.2.

OpenRLHF builds DeepSpeed's config from them, in ``utils/deepspeed/deepspeed_utils.py`` and ``utils/deepspeed/
deepspeed.py``; the flags and their defaults are in ``cli/train_*.py``. Read in the released wheels and tags of 0.5.4 to
0.11.2 (before 0.5.4 gradients were accumulated in fp32 where no flag said otherwise).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from trainfix.environment.configs.commands import Command, Flag, commands, hidden, ranks, whole_number
from trainfix.environment.configs.documents import ConfigError, Document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.shell import is_literal, may_be_many
from trainfix.environment.runconfig import ByRelease, Open, shown

KIND = "openrlhf"

_MODULE = re.compile(r"(?:.*[./])?openrlhf[./]cli[./](\w+?)(?:\.py)?")
_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "train_sft": "sft",
        "train_dpo": "dpo",
        "train_rm": "rm",
        "train_prm": "prm",
        "train_kto": "kto",
        "train_kd": "kd",
        "train_ppo": "ppo",
        "train_ppo_ray": "ppo",
    }
)
# The program -> its default of the micro-batch size, and of the epochs.
_MICRO: Mapping[str, object] = MappingProxyType(
    {
        **dict.fromkeys(("train_sft", "train_dpo", "train_kto", "train_kd"), 8),
        **dict.fromkeys(("train_rm", "train_prm"), 1),
        "train_ppo": 4,
        "train_ppo_ray": ByRelease("openrlhf", 4, (("0.10.0", 1),)),
    }
)
_EPOCHS: Mapping[str, object] = MappingProxyType({**dict.fromkeys(_TASKS, 1), "train_sft": 2})
_BF16 = ByRelease("openrlhf", False, (("0.9.2", True),))
_OPTIMIZER = ByRelease("openrlhf", None, (("0.10.2", "adamw"),))

# The flags that take no value, of all programs: a word after one of them is none of its own.
_SWITCHES = frozenset(
    """
    --actor.freeze_visual_encoder --actor.gradient_checkpointing_enable --actor.gradient_checkpointing_reentrant
    --actor.muon.nesterov --actor.muon.no_nesterov --actor_init_on_gpu --adam_offload
    --algo.advantage.is_correction_enable --algo.advantage.no_std_norm --algo.dynamic_filtering_enable
    --algo.kl.unbiased_gradient --algo.kl.use_loss --apply_chat_template --async_train --bf16 --ckpt.disable_ds
    --ckpt.load_enable --ckpt.save_hf --colocate_actor_ref --colocate_all_models --colocate_critic_reward
    --compute_fp32_loss --critic.muon.nesterov --critic.muon.no_nesterov --critic.save_value_network
    --data.apply_chat_template --data.disable_fast_tokenizer --data.multiturn --deepcompile
    --deepspeed_enable_sleep --disable_ds_ckpt --disable_fast_tokenizer --disable_trace_cache --ds.adam_offload
    --ds.deepcompile --ds.enable_sleep --ds.load_in_4bit --ds.overlap_comm --ds.packing_samples
    --ds.use_liger_kernel --ds.use_universal_ckpt --dynamic_filtering --enable_ema --enable_prefix_caching
    --enable_vllm_is_correction --enforce_eager --flash_attn --freeze_visual_encoder --full_determinism
    --gradient_checkpointing --gradient_checkpointing_use_reentrant --ipo --load_checkpoint --load_in_4bit
    --margin_loss --model.compute_fp32_loss_enable --model.gradient_checkpointing_enable
    --model.gradient_checkpointing_reentrant --model.ipo_enable --model.margin_loss_enable
    --model.pretrain_mode_enable --multiturn --muon.nesterov --muon.no_nesterov --no_advantage_std_norm
    --normalize_reward --overlap_comm --packing_samples --partial_rollout --perf --pretrain_mode --ref.offload
    --ref_offload --ref_reward_offload --reward.normalize_enable --reward.offload --save_hf_ckpt
    --save_value_network --teacher_offload --torch_compile --train.async_enable --train.colocate_actor_ref
    --train.colocate_all --train.colocate_critic_reward --train.dynamic_batch_enable --train.enable_ema
    --train.full_determinism_enable --train.partial_rollout_enable --universal_ckpt --use_ds_universal_ckpt
    --use_dynamic_batch --use_icepop --use_kl_estimator_k3 --use_kl_loss --use_liger_kernel --use_ms
    --vllm.enable_prefix_caching --vllm.enable_sleep --vllm.enforce_eager --vllm.sync_with_ray
    --vllm_enable_is_correction --vllm_enable_sleep --vllm_sync_with_ray
    """.split()
)
# Flags that are in both styles.
_IN_BOTH = frozenset(
    ("--local_rank", "--lr_scheduler", "--lr_warmup_ratio", "--max_norm", "--min_lr_ratio", "--use_ms")
)
# Flags that begin like one of ours and are none of its short forms.
_OWN_NAMES = frozenset(("--pretrain",))

Engine = Literal["model", "actor", "critic"]


def recognises(document: Document) -> bool:
    """Text that names OpenRLHF."""
    return not document.content and "openrlhf" in document.text.lower()


def read(document: Document) -> tuple[Draft, ...]:
    """A draft of each training that the file starts; two where the critic is trained otherwise than the actor.

    Raises ConfigError where it starts none.
    """
    found = commands(document)
    drafts = tuple(draft for command in found if program(command) for draft in drafted(document, command))
    if not drafts:
        raise ConfigError(_none_of(document, found))
    return drafts


def program(command: Command) -> str | None:
    """Which of OpenRLHF's training programs it starts, e.g. ``train_sft``."""
    match = _MODULE.fullmatch(command.program)
    return match[1] if match is not None and match[1].startswith("train_") else None


def drafted(document: Document, command: Command) -> tuple[Draft, ...]:
    """The drafts of one command that starts OpenRLHF."""
    given = _Given(command)
    if not (program(command) or "").startswith("train_ppo"):
        return (_draft(document, given, "model"),)
    actor = _draft(document, given, "actor")
    if given.word(("--advantage_estimator", "--algo.advantage.estimator"), "gae").value not in ("gae",):
        return (actor,)  # the others train no critic
    critic = _draft(document, given, "critic")
    return (actor,) if critic.values == actor.values else (actor, critic)


@dataclass(frozen=True)
class _Said:
    """What a flag says. `name`: the flag; `words`: flag and value, or that it is not given; `note`: what holds then."""

    value: object
    name: str
    words: str
    note: str = ""


class _Given:
    """The flags of one command, read as the program's own argparse reads them."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.file = command.file
        self._flags: dict[str, Flag] = {flag.name: flag for flag in command.flags}  # the last one holds
        self.sections = any("." in name for name in self._flags)
        self.flat = not self.sections and bool(self._flags.keys() - _IN_BOTH)
        self._free = next(iter(_free_words(command)), None)
        # A release that takes these flags, where they tell enough of it.
        release = "0.10.2" if self.sections else "0.9.1" if "--bf16" in self._flags else None
        self.versions = {} if release is None else {"openrlhf": release}

    def switch(self, names: Sequence[str]) -> _Said:
        """A flag that takes no value."""
        return self._said(names, lambda flag: True, False)

    def number(self, names: Sequence[str], default: object, kind: type[int] | type[float] = int) -> _Said:
        """A flag that takes a number."""
        wanted = "a whole number" if kind is int else "a number"
        take = whole_number if kind is int else float
        return self._said(names, lambda flag: self._converted(flag, take, wanted), default)

    def word(self, names: Sequence[str], default: object) -> _Said:
        """A flag that takes a word."""
        return self._said(names, lambda flag: self._converted(flag, str, "a word"), default)

    def _said(self, names: Sequence[str], take: Callable[[Flag], object], default: object) -> _Said:
        given = [flag for name, flag in self._flags.items() if name in names]
        if given:
            flag = given[-1]
            return _Said(take(flag), flag.name, " ".join((flag.name, *flag.values[: flag.name not in _SWITCHES])))
        name = next((name for name in names if ("." in name) == self.sections), names[0])
        short = next((flag for flag in self._flags if self._is_short(flag, names)), None)
        if short is not None:
            return self._open(name, f"{short} ({self.file}) may be short for {name}; write it in full")
        if self._free is not None:
            why = f"{name} is not in {self.file} itself, but {self._free} there may hold it"
            return self._open(name, why)
        if isinstance(default, ByRelease) and self.versions:
            default = default.at(self.versions)
        note = "" if default is None or default is False else f"OpenRLHF takes {shown(default)}"
        return _Said(default, name, f"{name} is not given", note)

    def _is_short(self, flag: str, names: Sequence[str]) -> bool:
        return flag not in _OWN_NAMES and any(name.startswith(flag) for name in names)

    def _open(self, name: str, why: str) -> _Said:
        return _Said(Open(why), name, name)

    def _converted(self, flag: Flag, kind: Callable[[str], object], wanted: str) -> object:
        value = flag.values[0] if flag.values else ""
        if not is_literal(value):
            return Open(f"{flag.name} {value} ({self.file}): the script alone does not say what {value} is")
        try:
            if not value:
                return Open(f"{flag.name} ({self.file}) has no value")
            return kind(value)
        except ValueError:
            return Open(f"{flag.name} {value} ({self.file}) is not {wanted}, which OpenRLHF refuses")


def _free_words(command: Command) -> list[str]:
    """Words that are no flag's value and may hold any flag: ``$EXTRA_ARGS``, ``"$@"``."""
    words = list(command.words)
    for flag in command.flags:
        takes = flag.name not in _SWITCHES and not any(map(may_be_many, flag.values[:1]))
        words.extend(flag.values[takes:])
    return [word for word in words if not is_literal(word)]


# From flags to DeepSpeed's config


def _draft(document: Document, given: _Given, engine: Engine) -> Draft:
    """The run of one model."""
    command = given.command
    draft = Draft(Document(document.path, document.text, {}, command.lines()), KIND, "program")
    name = program(command) or ""
    draft.put("framework", "openrlhf", text=f"{command.program} ({command.place})")
    draft.put("deepspeed", True, text=f"OpenRLHF always trains with DeepSpeed ({command.place})")
    draft.put("task", _task(given, name), text=f"{command.program} ({command.place})")
    _put(draft, "epochs", given.number(("--max_epochs", "--train.max_epochs"), _EPOCHS.get(name, _unread(command))))
    _zero(draft, given)
    _types(draft, given)
    _optimizer(draft, given, engine)
    _batches(draft, given, engine)
    for key, origin in draft.origins.items():
        draft.origins[key] = origin if origin.line else replace(origin, line=command.line)
    return draft


def _task(given: _Given, name: str) -> object:
    """The kind of training; train_sft also continues a pre-training."""
    pretrains = given.switch(("--pretrain_mode", "--model.pretrain_mode_enable"))
    if name != "train_sft" or pretrains.value is False:
        return _TASKS.get(name, name.removeprefix("train_"))
    return "pt" if pretrains.value is True else pretrains.value


def _unread(command: Command) -> Open:
    return Open(f"{command.program} ({command.place}): trainfix knows no default of it")


def _put(draft: Draft, key: str, said: _Said, value: object = None, note: str = "") -> None:
    """`key` is what a flag says (or the `value` that follows from it)."""
    note = note or said.note
    text = f"{said.words} ({draft.source}){': ' + note if note else ''}"
    draft.put(key, said.value if value is None else value, said.name, text=text)


def _zero(draft: Draft, given: _Given) -> None:
    _put(draft, "zero_optimization.stage", given.number(("--zero_stage", "--ds.zero_stage"), 2))
    offload = given.switch(("--adam_offload", "--ds.adam_offload"))
    device = offload.value if isinstance(offload.value, Open) else "cpu" if offload.value else "none"
    _put(draft, "zero_optimization.offload_optimizer.device", offload, device)
    fixed = f"OpenRLHF sets it ({given.command.place})"
    draft.put("zero_optimization.offload_optimizer.pin_memory", True, text=fixed)
    draft.put("zero_optimization.offload_param.device", "none", text=fixed)
    draft.put("zero_optimization.zero_quantized_weights", False, text=fixed)
    draft.put("zero_optimization.zero_quantized_gradients", False, text=fixed)
    draft.put("prescale_gradients", False, text=fixed)
    _put(draft, "zero_optimization.zero_hpz_partition_size", given.number(("--zpg", "--ds.zpg"), 1))
    overlap = given.switch(("--overlap_comm", "--ds.overlap_comm"))
    if overlap.value is not False:
        _put(draft, "zero_optimization.overlap_comm", overlap)
    _put(draft, "compile.deepcompile", given.switch(("--deepcompile", "--ds.deepcompile")))


def _types(draft: Draft, given: _Given) -> None:
    """The model's data type: --bf16 up to 0.9.1, --param_dtype from 0.9.2 on."""
    named = given.word(("--param_dtype", "--ds.param_dtype"), None)
    flag = given.switch(("--bf16",))
    if isinstance(named.value, Open) or (named.value is None and isinstance(flag.value, Open)):
        for key in ("bf16.enabled", "fp16.enabled"):
            _put(draft, key, named if isinstance(named.value, Open) else flag)
    elif named.value is not None:
        for key in ("bf16", "fp16"):
            _put(draft, f"{key}.enabled", named, named.value == key)
    elif flag.value is True:
        _put(draft, "bf16.enabled", flag)
        draft.put("fp16.enabled", False, "--bf16", text=f"{flag.words} ({draft.source})")
    else:
        bf16 = _BF16.at(given.versions) if given.versions else _BF16
        missing = f"{named.name} is not given"
        _put(draft, "bf16.enabled", _Said(bf16, named.name, missing, f"OpenRLHF takes bf16: {shown(bf16)}"))
        _put(draft, "fp16.enabled", _Said(False, named.name, missing))
    accumulation = given.word(("--grad_accum_dtype", "--ds.grad_accum_dtype"), None)
    if accumulation.value is not None:
        _put(draft, "data_types.grad_accum_dtype", accumulation)


def _optimizer(draft: Draft, given: _Given, engine: Engine) -> None:
    """The clipping, and the optimizer that DeepSpeed builds since 0.10.2; before, OpenRLHF passes its own."""
    clipping = ("--max_norm",) if engine == "model" else ("--max_norm", f"--{engine}.max_norm")
    _put(draft, "gradient_clipping", given.number(clipping, 1.0, float))
    chosen = given.word(("--optim",) if engine == "model" else (f"--{engine}.optim",), _OPTIMIZER)
    if isinstance(chosen.value, str):
        _put(draft, "optimizer.type", chosen, "muon" if chosen.value == "muon" else "adamw")
    elif chosen.value is not None and not given.flat:
        _put(draft, "optimizer.type", chosen)


def _batches(draft: Draft, given: _Given, engine: Engine) -> None:
    """The data-parallel ranks, and the micro-batches of a window."""
    name = program(given.command) or ""
    count = _data_parallel(given, *_world(given, name, engine))
    draft.put("ranks", count.value, count.name, text=f"{count.words} ({draft.source})")
    total = given.number(("--train_batch_size", "--train.batch_size"), 128)
    micro = given.number(
        ("--micro_train_batch_size", "--train.micro_batch_size"), _MICRO.get(name, _unread(given.command))
    )
    dynamic = given.switch(("--use_dynamic_batch", "--train.dynamic_batch_enable"))
    if name == "train_ppo_ray" and dynamic.value is not False:
        note = "OpenRLHF has DeepSpeed accumulate nothing, and calls backward() several times per step"
        one = 1 if dynamic.value is True else dynamic.value
        for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
            _put(draft, key, dynamic, one, note)
        return
    _put(draft, "train_micro_batch_size_per_gpu", micro)
    # Up to 0.7.0 the actor may learn from a second data set too, in micro-batches of its own.
    again = given.word(("--pretrain_data",), None) if engine == "actor" and not given.sections else None
    if again is not None and isinstance(again.value, Open):
        _put(draft, "gradient_accumulation_steps", again)
        return
    times = 1 if again is None or again.value is None else 2
    steps, why = _steps(total, micro, count, times, draft.source)
    draft.put("gradient_accumulation_steps", steps, total.name, text=why)


def _world(given: _Given, name: str, engine: Engine) -> tuple[object, str]:
    """All ranks of a model, and how the command says so."""
    if name != "train_ppo_ray":
        return ranks(given.command)
    nodes = given.number((f"--{engine}_num_nodes", f"--{engine}.num_nodes"), 1)
    each = given.number((f"--{engine}_num_gpus_per_node", f"--{engine}.num_gpus_per_node"), 8)
    for said in (nodes, each):
        if isinstance(said.value, Open):
            return said.value, said.words
    if isinstance(nodes.value, int) and isinstance(each.value, int):
        return nodes.value * each.value, f"{nodes.name} {nodes.value} x {each.name} {each.value}"
    return _unread(given.command), nodes.name


def _data_parallel(given: _Given, world: object, words: str) -> _Said:
    """The ranks that see different data: those of one ring, or of one tensor, see the same."""
    ring = given.number(("--ring_attn_size", "--ds.ring_attn_size"), 1)
    tensor = given.number(("--ds_tensor_parallel_size", "--ds.tensor_parallel_size"), 1)
    for value in (world, ring.value, tensor.value):
        if isinstance(value, Open):
            return _Said(value, ring.name, words)
    words += "".join(f" / {said.name} {said.value}" for said in (ring, tensor) if said.value != 1)
    together = _product(ring.value, tensor.value)
    if not isinstance(world, int) or together < 1 or world < 1 or world % together:
        return _Said(Open(f"{words} ({given.file}) is no whole number of data-parallel ranks"), ring.name, words)
    return _Said(world // together, ring.name, f"data-parallel ranks = {world // together}: {words}")


def _steps(total: _Said, micro: _Said, count: _Said, times: int, file: str) -> tuple[object, str]:
    """train_batch_size / (micro_train_batch_size x data-parallel ranks), and the reason."""
    sizes = f"{_size(total)}{' x 2 (--pretrain_data)' if times == 2 else ''} / ({_size(micro)} x "
    for said in (total, micro):
        if isinstance(said.value, Open):
            return said.value, said.value.why
    if isinstance(count.value, Open):
        why = f"{sizes}ranks), and {count.value.why}"
        return Open(why), why
    sizes += f"{count.value} ranks) ({file})"
    if isinstance(micro.value, ByRelease):
        before = _quotient(total.value, micro.value.before, count.value, times)
        since = [(release, _quotient(total.value, size, count.value, times)) for release, size in micro.value.since]
        if None not in (before, *(steps for _, steps in since)):
            return ByRelease(micro.value.package, before, tuple(since)), sizes
    steps = _quotient(total.value, micro.value, count.value, times)
    if steps is None:
        why = f"{sizes}: no whole number of micro-batches, which DeepSpeed refuses"
        return Open(why), why
    return steps, f"gradient_accumulation_steps = {steps}: {sizes}"


def _size(said: _Said) -> str:
    return f"{said.name} {'(not given)' if isinstance(said.value, ByRelease) else said.value}"


def _product(*numbers: object) -> int:
    product = 1
    for number in numbers:
        product *= number if isinstance(number, int) else 0
    return product


def _quotient(total: object, micro: object, count: object, times: int) -> int | None:
    whole, part = _product(total, times), _product(micro, count)
    return whole // part if part > 0 and whole > 0 and whole % part == 0 else None


# What is no training of OpenRLHF


def _none_of(document: Document, found: Sequence[Command]) -> str:
    """Why no command of the file is a training of OpenRLHF."""
    for command in found:
        if _MODULE.fullmatch(command.program):
            return f"{command.place}: {command.program} trains nothing; name the script that starts the training"
    return hidden(found) or (
        f"{document.path} starts no training of OpenRLHF (python -m openrlhf.cli.train_sft or its like); name the "
        "script that does"
    )
