"""The arguments of transformers' Trainer (`TrainingArguments`) as JSON or YAML, and what Trainer makes of them.

TRL, LLaMA-Factory and axolotl train with Trainer: `arguments` reads theirs too. From the released sources of
transformers 4.41.0 to 5.6.0 (``training_args.py``, ``trainer.py``, ``integrations/deepspeed.py``) and of accelerate
1.0.1 to 1.11.0 (``DeepSpeedPlugin``, ``AcceleratorState``). Where Trainer's arguments and DeepSpeed's config name the
same thing differently, Trainer stops before it trains; so it does for FSDP together with DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from trainfix.environment.configs.documents import Document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.values import fraction, number, said, truth, whole, written
from trainfix.environment.runconfig import ByRelease, Open, shown

KIND = "transformers"

# Arguments that no other program's config has at its top; two of them are enough.
DISTINCTIVE = frozenset(
    """
    adam_beta1 adam_epsilon auto_find_batch_size average_tokens_across_devices bf16_full_eval
    dataloader_num_workers ddp_find_unused_parameters eval_steps eval_strategy evaluation_strategy fp16_full_eval
    fp16_opt_level gradient_checkpointing gradient_checkpointing_kwargs label_smoothing_factor learning_rate
    logging_steps logging_strategy lr_scheduler_type max_grad_norm max_steps num_train_epochs output_dir
    overwrite_output_dir per_device_eval_batch_size per_device_train_batch_size per_gpu_train_batch_size
    remove_unused_columns report_to resume_from_checkpoint save_steps save_strategy save_total_limit warmup_ratio
    warmup_steps weight_decay
    """.split()
)
AVERAGED = ByRelease("transformers", False, (("4.54.0", True),))


class Fill(NamedTuple):
    """What Trainer puts where the DeepSpeed config says "auto": its argument, and that argument's default."""

    argument: str
    default: object


FILLS: Mapping[str, Fill] = MappingProxyType(
    {
        "gradient_clipping": Fill("max_grad_norm", 1.0),
        "optimizer.params.lr": Fill("learning_rate", 5e-5),
        "optimizer.params.eps": Fill("adam_epsilon", 1e-8),
        "optimizer.params.weight_decay": Fill("weight_decay", 0.0),
        "scheduler.params.warmup_max_lr": Fill("learning_rate", 5e-5),
    }
)
# What Trainer puts there too, and no config shows.
COMPUTED: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": "it follows from the number of ranks",
        "optimizer.params.betas": "it is adam_beta1 and adam_beta2",
        "scheduler.params.total_num_steps": "it follows from the data",
        "scheduler.params.warmup_num_steps": "it follows from the data",
        "zero_optimization.reduce_bucket_size": "it follows from the model's hidden size",
        "zero_optimization.stage3_param_persistence_threshold": "it follows from the model's hidden size",
        "zero_optimization.stage3_prefetch_bucket_size": "it follows from the model's hidden size",
    }
)


def recognises(document: Document) -> bool:
    """Two arguments that only Trainer has."""
    return len(DISTINCTIVE & document.content.keys()) >= 2


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a run with Trainer; what kind of training it is stands in the program."""
    draft = Draft(document, KIND, "program")
    draft.put("framework", "transformers", text=f"{document.path} has the arguments of transformers' Trainer")
    draft.put("task", Open(f"{document.path} has no key for the kind of training: the program decides it"))
    arguments(draft, "transformers")
    deepspeed(draft)
    return (draft,)


def arguments(draft: Draft, who: str, *, bf16: object = False, learning_rate: object = 5e-5) -> None:
    """Trainer's arguments, but for the choice of DeepSpeed. `who` has these defaults for `bf16` and `learning_rate`."""
    take(draft, "gradient_accumulation_steps", "gradient_accumulation_steps", whole, 1, who)
    take(draft, "label_smoothing_factor", "label_smoothing_factor", fraction, 0.0, who)
    take(draft, "average_tokens_across_devices", "average_tokens_across_devices", truth, AVERAGED, who)
    epochs(draft, "num_train_epochs", 3.0, who)
    precision(draft, "bf16", bf16, who)
    precision(draft, "fp16", False, who)
    fill_micro_batch(draft, "per_device_train_batch_size", 8, who)
    fills(draft, who, {"learning_rate": learning_rate})


def take(draft: Draft, key: str, name: str, kind: Callable[[object], object], default: object, who: str) -> None:
    """`key` from the argument `name`, or else what `who` takes, in place of "auto" too."""
    value = written(draft, name, kind)
    if value is None:
        draft.assume(key, default, who, name)
        draft.fills[key] = default
    else:
        draft.put(key, value, name)


def epochs(draft: Draft, name: str, default: object, who: str) -> None:
    """The number of epochs, which a limit on the steps overrides."""
    limit = draft.document.content.get("max_steps")
    steps = number(limit)
    if limit is not None and (steps is None or steps > 0):
        draft.put(
            "epochs", Open(f"{said(draft, 'max_steps')} decides: how many epochs it is follows from the data"), name
        )
    else:
        take(draft, "epochs", name, number, default, who)


def precision(draft: Draft, name: str, default: object, who: str) -> None:
    """A switch for 16 bits. What is on also holds where the DeepSpeed config has no such section (accelerate adds it);
    evaluation in 16 bits counts only where it says "auto"."""
    key, value = f"{name}.enabled", written(draft, name, truth)
    if value is True or isinstance(value, Open):
        draft.put(key, value, name)
        return
    text = said(draft, name) if value is False else f"{name} is not set ({draft.source}): {who} takes {shown(default)}"
    if value is None and (default is True or isinstance(default, (Open, ByRelease))):
        draft.assumed[key] = draft.fills[key] = default
    else:
        draft.assumed[key] = False
        draft.fills[key] = written(draft, f"{name}_full_eval", truth) or False
    draft.origins[key] = draft.place(name, text=text)


def fill_micro_batch(draft: Draft, name: str, default: int, who: str) -> None:
    """The size of a micro-batch, which Trainer may have to search."""
    key = "train_micro_batch_size_per_gpu"
    if written(draft, "auto_find_batch_size", truth) not in (None, False):
        draft.fill(key, Open(f"{said(draft, 'auto_find_batch_size')}: Trainer searches it"), "auto_find_batch_size")
        return
    value = written(draft, name, whole)
    text = f"{name} is not set ({draft.source}): {who} takes {default}" if value is None else ""
    draft.fill(key, default if value is None else value, name, text=text)


def fills(draft: Draft, who: str, defaults: Mapping[str, object]) -> None:
    """The rest of what Trainer puts in place of "auto". `defaults`: of arguments, where `who` has others."""
    for key, (argument, default) in FILLS.items():
        value = written(draft, argument, number)
        taken = defaults.get(argument, default) if value is None else value
        text = f"{argument} is not set ({draft.source}): {who} takes {shown(taken)}" if value is None else ""
        draft.fill(key, taken, argument, text=text)
    draft.fill("scheduler.params.warmup_min_lr", 0, text="transformers fills in 0")
    for key, why in COMPUTED.items():
        draft.fill(key, Open(f"{key} is filled in by Trainer: {why} ({draft.source} does not show it)"))


def deepspeed(draft: Draft, absent: object = None, who: str = "transformers") -> None:
    """The DeepSpeed config that the argument `deepspeed` names or holds, and what holds where it is not set: `absent`,
    by default open."""
    config = draft.document.content.get("deepspeed")
    if isinstance(config, str) and config.strip().startswith("{"):
        config = _inline(config)
    if config and isinstance(config, (str, dict)):
        draft.deepspeed = config
    elif config:
        draft.put("deepspeed", Open(f"{said(draft, 'deepspeed')}: neither a file nor a section"))
    elif draft.document.content.get("fsdp"):
        draft.put("deepspeed", False, "fsdp", text=f"{said(draft, 'fsdp')}, beside which Trainer refuses DeepSpeed")
    elif absent is not None:
        draft.assume("deepspeed", absent, who)
    else:
        why = (
            f"deepspeed is not set ({draft.source}), and accelerate's config may choose DeepSpeed: give that config "
            "with a second --config"
        )
        draft.assume("deepspeed", Open(why), who)


def _inline(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return [text]
