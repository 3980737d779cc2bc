"""LLaMA-Factory's training arguments as YAML or JSON (``llamafactory-cli train FILE``), and those of its v1 trainer.

From the released sources of LLaMA-Factory 0.9.3 to 0.9.5 (``launcher.py``, ``hparams/``, ``v1/``). It trains with
transformers' Trainer, and ``llamafactory-cli`` starts ``torchrun``, never accelerate: DeepSpeed is used where
`deepspeed` is set. The v1 trainer (``USE_V1=1``) has a loop of its own and other names.
"""

from __future__ import annotations

from trainfix.environment.configs.documents import ConfigError, Document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.transformers import arguments, deepspeed, epochs, take
from trainfix.environment.configs.values import said, truth, whole, written
from trainfix.environment.runconfig import Open, shown

KIND = "llamafactory"

STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")
# Keys that no other program's config here has.
OWN = frozenset(
    """
    cutoff_len dataset_dir finetuning_type freeze_trainable_layers infer_backend mix_strategy neat_packing
    overwrite_cache pref_beta pref_loss pure_bf16 tokenized_path use_asft_loss use_badam use_galore use_unsloth
    val_size
    """.split()
)
V1 = frozenset(
    """
    batching_strategy dist_config init_config kernel_config optim_config peft_config quant_config train_dataset
    """.split()
)
# What llamafactory-cli does with a config beside training: key -> in words.
NOT_TRAINING = {
    "export_dir": "exports a model",
    "infer_backend": "serves a model",
    "do_predict": "predicts",
    "do_eval": "evaluates",
}


def recognises(document: Document) -> bool:
    """A stage and a way of tuning, or two keys that only LLaMA-Factory has."""
    content = document.content
    if _is_v1(document):
        return True
    if content.get("stage") in STAGES and "model_name_or_path" in content:
        return True
    return len(OWN & content.keys()) >= 2 or ({"template", "model_name_or_path"} <= content.keys())


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a training. Raises ConfigError for a config that trains nothing."""
    draft = Draft(document, KIND, "program")
    if _is_v1(document):
        _v1(draft)
        return (draft,)
    draft.put("framework", "llamafactory", text=f"{document.path} is a config for LLaMA-Factory")
    _refuse_others(draft)
    _task(draft)
    take(draft, "use_asft_loss", "use_asft_loss", truth, False, "LLaMA-Factory")
    arguments(draft, "LLaMA-Factory")
    if written(draft, "fp8", truth) is True and draft.values.get("bf16.enabled") is not True:
        draft.put("bf16.enabled", Open(f"{said(draft, 'fp8')}, and bf16 is not true"), "fp8")
    deepspeed(draft, False, "llamafactory-cli, which starts torchrun,")
    return (draft,)


def _is_v1(document: Document) -> bool:
    """Whether it is for the v1 trainer: it names its model `model`."""
    keys = document.content.keys()
    return "model" in keys and bool(V1 & keys) and "model_name_or_path" not in keys


def _task(draft: Draft) -> None:
    stage = draft.document.content.get("stage")
    if stage is None:
        draft.assume("task", "sft", "LLaMA-Factory", "stage")
    elif stage in STAGES:
        draft.put("task", stage, "stage")
    else:
        draft.put("task", Open(f"{said(draft, 'stage')}: LLaMA-Factory knows {', '.join(STAGES)}"), "stage")


def _refuse_others(draft: Draft) -> None:
    """An export, a chat or an evaluation: nothing in it can be a wrong gradient."""
    content = draft.document.content
    if written(draft, "do_train", truth) not in (None, False):
        return
    for key, does in NOT_TRAINING.items():
        if content.get(key) not in (None, False):
            raise ConfigError(
                f"{draft.source} trains nothing: LLaMA-Factory {does} with it ({key} = {shown(content[key])}, and "
                "do_train is not true); name a config for llamafactory-cli train"
            )
    if not {"dataset", "stage", "output_dir", "do_train"} & content.keys():
        raise ConfigError(
            f"{draft.source} trains nothing: it is for LLaMA-Factory, and names neither a dataset nor an output_dir; "
            "name a config for llamafactory-cli train"
        )


def _v1(draft: Draft) -> None:
    """The v1 trainer: its batches, and DeepSpeed where dist_config says so. accelerate builds DeepSpeed's config."""
    who = "LLaMA-Factory's v1 trainer"
    content = draft.document.content
    draft.put("framework", "llamafactory-v1", text=f"{draft.source} is a config for {who}")
    if not {"train_dataset", "output_dir"} & content.keys():
        raise ConfigError(
            f"{draft.source} trains nothing: it names neither a train_dataset nor an output_dir; name the config of a "
            "training"
        )
    draft.put("task", Open(f"{draft.source} does not say which command takes it (llamafactory-cli sft, dpo, rm)"))
    epochs(draft, "num_train_epochs", 3, who)
    _v1_steps(draft, who)
    for key, on in (("bf16.enabled", True), ("fp16.enabled", False)):
        draft.assume(key, on, who)
        draft.fills[key] = on
    draft.fill("gradient_clipping", 1.0, text="accelerate fills in 1.0")
    micro = written(draft, "micro_batch_size", whole)
    draft.fill("train_micro_batch_size_per_gpu", 1 if micro is None else micro, "micro_batch_size")
    chosen = content.get("dist_config")
    name = chosen.get("name") if isinstance(chosen, dict) else chosen
    if name == "deepspeed" and isinstance(chosen, dict) and isinstance(chosen.get("config_file"), str):
        draft.deepspeed = chosen["config_file"]
    elif name == "deepspeed":
        draft.put("deepspeed", True, "dist_config", text=f"dist_config.name = deepspeed ({draft.source})")
        draft.put("", Open(f"dist_config has no config_file ({draft.source})"), "dist_config")
    else:
        words = f"dist_config.name = {shown(name)}" if name else "dist_config is not set"
        draft.put("deepspeed", False, "dist_config", text=f"{words} ({draft.source})")


def _v1_steps(draft: Draft, who: str) -> None:
    """The window: the global batch over the micro-batch and the ranks."""
    total, micro = (written(draft, name, whole) for name in ("global_batch_size", "micro_batch_size"))
    key = "gradient_accumulation_steps"
    if "dynamic" in str(draft.document.content.get("batching_strategy")):
        why = f"{said(draft, 'batching_strategy')}: the length of the rows decides how many micro-batches a window has"
        draft.put(key, Open(why), "batching_strategy")
    elif total is None:
        draft.assume(key, 1, who, "global_batch_size")
    elif total == (1 if micro is None else micro):
        draft.put(key, 1, "global_batch_size")
    else:
        why = f"{said(draft, 'global_batch_size')} is shared by micro-batches and ranks, and their number is not known"
        draft.put(key, Open(why), "global_batch_size")
    draft.fills[key] = draft.values.get(key, 1)
