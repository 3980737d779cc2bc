"""The YAML that TRL's commands take (``trl sft --config FILE``): Trainer's arguments, TRL's own, and the launcher's.

From the released sources of TRL 0.9.6 to 0.29.0 (``cli.py``, ``scripts/utils.py``, ``trainer/*_config.py``). A command
starts ``accelerate launch``; `accelerate_config` names its config, a file or one of those that TRL ships (from 0.18.2
on at the latest; up to 0.24 at least only ``trl sft`` reads it).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from trainfix.environment.configs import accelerate
from trainfix.environment.configs.documents import Document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.transformers import arguments, deepspeed
from trainfix.environment.configs.values import said, truth, whole, written
from trainfix.environment.runconfig import ByRelease, Open

KIND = "trl"

# Keys that only one command's config has in the releases above -> the kind of training.
TELLS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            """
            assistant_only_loss chars_per_token completion_only_loss dataset_batch_size dataset_kwargs
            dataset_text_field eval_packing max_seq_length num_of_sequences packing packing_strategy
            use_liger
            """.split(),
            "sft",
        ),
        **dict.fromkeys(
            """
            discopop_tau f_alpha_divergence_coef f_divergence_type force_use_ref_model label_smoothing
            ld_alpha loss_weights max_target_length reference_free rpo_alpha use_weighting
            """.split(),
            "dpo",
        ),
        **dict.fromkeys(("desirable_weight", "prompt_sample_size", "undesirable_weight"), "kto"),
        **dict.fromkeys(("importance_sampling_level", "off_policy_mask_threshold", "scale_rewards"), "grpo"),
        "center_rewards_coefficient": "reward",
        "rloo_k": "rloo",
    }
)
# Keys of several commands' configs, but not of trl sft's.
NOT_SFT = frozenset(
    """
    beta max_completion_length max_prompt_length num_generations num_iterations precompute_ref_log_probs
    reward_funcs reward_weights
    """.split()
)
PREFERENCES = "preference or reinforcement learning"
# Keys of TRL's scripts and trainers that no other program's config here has.
OWN = frozenset(
    """
    accelerate_config dataset_mixer dataset_mixture dataset_test_split dataset_train_split lora_task_type
    max_completion_length max_prompt_length num_generations reward_funcs reward_weights use_peft
    """.split()
)
# Arguments of transformers' own example scripts, which name a model and a dataset too.
SCRIPTS = frozenset(
    """
    block_size dataset_config_name mlm_probability model_type preprocessing_num_workers source_lang target_lang
    task_name text_column train_file validation_file validation_split_percentage
    """.split()
)
BF16 = ByRelease("trl", False, (("0.19.0", True),))
# The accelerate configs that TRL ships, by name; the same in 0.18.2 to 0.29.0. What they have in common is in COMMON.
COMMON: Mapping[str, object] = MappingProxyType(
    {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16", "num_machines": 1, "num_processes": 8}
)
SHIPPED: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "fsdp1": {"distributed_type": "FSDP"},
        "fsdp2": {"distributed_type": "FSDP"},
        "multi_gpu": {"distributed_type": "MULTI_GPU"},
        "single_gpu": {"distributed_type": "NO"},
        "zero1": {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"gradient_accumulation_steps": 1, "zero3_init_flag": False, "zero_stage": 1},
        },
        "zero2": {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "offload_optimizer_device": "none",
                "offload_param_device": "none",
                "zero3_init_flag": False,
                "zero_stage": 2,
            },
        },
        "zero3": {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "offload_optimizer_device": "none",
                "offload_param_device": "none",
                "zero3_init_flag": True,
                "zero3_save_16bit_model": True,
                "zero_stage": 3,
            },
        },
    }
)


def recognises(document: Document) -> bool:
    """A model and a dataset by name in YAML, or keys that only TRL has; no stage, which is LLaMA-Factory's."""
    keys = document.content.keys()
    if "model_name_or_path" not in keys or {"stage", "finetuning_type"} & keys:
        return False
    if OWN & keys:
        return True
    yaml = document.path.lower().endswith((".yaml", ".yml"))
    return yaml and bool({"dataset_name", "datasets", *TELLS} & keys) and not SCRIPTS & keys


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a run with one of TRL's trainers."""
    draft = Draft(document, KIND, "program")
    draft.put("framework", "trl", text=f"{document.path} is a config for TRL's commands")
    _task(draft)
    # Each trainer of TRL has its own default for the rate.
    rate = Open(f"learning_rate is not set ({document.path}): it depends on TRL's command")
    bf16 = False if written(draft, "fp16", truth) is True else BF16
    arguments(draft, "TRL", bf16=bf16, learning_rate=rate)
    deepspeed(draft)
    _launcher(draft)
    return (draft,)


def _task(draft: Draft) -> None:
    """The kind of training, where the keys are those of one command, or not of ``trl sft``."""
    tells = {TELLS[key]: key for key in draft.document.content if key in TELLS}
    other = next((key for key in draft.document.content if key in NOT_SFT), None)
    if len(tells) == 1 and not (other and "sft" in tells):
        ((task, key),) = tells.items()
        draft.put("task", task, key, text=f"{key}, which only TRL's {task} trainer has, is set ({draft.source})")
    elif other and "sft" not in tells:
        text = f"{other}, which TRL's sft trainer does not have, is set ({draft.source})"
        draft.put("task", PREFERENCES, other, text=text)
    else:
        why = f"{draft.source} does not say which of TRL's commands takes it (trl sft, trl dpo, ...)"
        draft.put("task", Open(why))


def _launcher(draft: Draft) -> None:
    """What ``accelerate launch`` gets: keys that the trainer does not know are handed on to it."""
    content = draft.document.content
    if content.get("num_processes") is not None:
        draft.put("ranks", written(draft, "num_processes", whole), "num_processes")
    if content.get("use_deepspeed") is not None:
        draft.put("deepspeed", Open(f"{said(draft, 'use_deepspeed')}: accelerate builds the DeepSpeed config"))
        draft.put("", draft.values["deepspeed"], "use_deepspeed")
    name = content.get("accelerate_config")
    if not isinstance(name, str):
        return
    shipped = SHIPPED.get(name)
    if shipped is None or Path(name).is_file():
        draft.accelerate = name
        return
    document = Document(f"TRL's {name}.yaml", "", {**COMMON, **shipped})
    (draft.accelerate,) = accelerate.read(document)
