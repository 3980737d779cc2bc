"""axolotl's YAML (``axolotl train FILE``): it trains with transformers' Trainer or TRL's, under names of its own.

From the released sources of axolotl 0.16.1 and 0.18.0 (``utils/schemas/``, ``utils/config/__init__.py``,
``core/builders/``, ``utils/trainer.py``). axolotl starts ``accelerate launch`` without a config file, and uses
DeepSpeed where `deepspeed` is set: a path, often below ``deepspeed_configs/``, where ``axolotl fetch`` puts its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trainfix.environment.configs import transformers
from trainfix.environment.configs.documents import Document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.transformers import deepspeed, epochs, fill_micro_batch, fills, take
from trainfix.environment.configs.values import said, truth, whole, written
from trainfix.environment.runconfig import ByRelease, Open

KIND = "axolotl"
WHO = "axolotl"
# It builds its trainers with average_tokens_across_devices=False now; before, Trainer's default held.
AVERAGED = ByRelease("axolotl", transformers.AVERAGED, (("0.12.2", False),))

OWN = frozenset(
    """
    adapter chat_template_jinja dataset_prepared_path flash_attention gradient_accumulation_steps lora_r
    micro_batch_size num_epochs pretraining_dataset rl sample_packing sequence_len special_tokens test_datasets
    train_on_inputs type_of_model val_set_size
    """.split()
)
# The value of `rl` -> the kind of training, for those that have a name of their own here.
RL: Mapping[str, str] = MappingProxyType({"ipo": "dpo", "simpo": "cpo"})


def recognises(document: Document) -> bool:
    """base_model, and two keys that belong to it."""
    return "base_model" in document.content and len(OWN & document.content.keys()) >= 2


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a run."""
    draft = Draft(document, KIND, "program")
    draft.put("framework", "axolotl", text=f"{document.path} is a config for axolotl")
    _task(draft)
    _steps(draft)
    epochs(draft, "num_epochs", 1.0, WHO)
    draft.assume("label_smoothing_factor", 0.0, WHO)  # it has no key for it
    draft.assume("average_tokens_across_devices", AVERAGED, WHO)
    _precision(draft)
    fill_micro_batch(draft, "micro_batch_size", 1, WHO)
    fills(draft, WHO, {})
    deepspeed(draft, False, "axolotl, unless an accelerate config says otherwise,")
    return (draft,)


def _task(draft: Draft) -> None:
    content = draft.document.content
    for key, task in (("reward_model", "rm"), ("process_reward_model", "prm")):
        if content.get(key):
            draft.put("task", task, key)
            return
    rl = content.get("rl")
    if rl:
        draft.put("task", RL.get(str(rl).lower(), str(rl).lower()), "rl")
    elif content.get("pretraining_dataset"):
        draft.put("task", "pt", "pretraining_dataset", text=f"pretraining_dataset is set ({draft.source})")
    else:
        draft.assume("task", "sft", WHO, "rl")


def _steps(draft: Draft) -> None:
    """The window, or else the batch over the micro-batch, as axolotl divides it."""
    key = "gradient_accumulation_steps"
    steps, total, micro = (written(draft, name, whole) for name in (key, "batch_size", "micro_batch_size"))
    if steps is not None or total is None:
        take(draft, key, key, whole, 1, WHO)
        return
    micro = 1 if micro is None else micro
    if isinstance(total, int) and isinstance(micro, int):
        text = f"{said(draft, 'batch_size')} // micro_batch_size {micro}"
        draft.put(key, total // micro or Open(f"{text} is 0"), "batch_size", text=text)
    else:
        draft.put(key, total if isinstance(total, Open) else micro, "batch_size")


def _precision(draft: Draft) -> None:
    """The switches for 16 bits: bf16 wins over fp16; "auto" asks the device, "full" is for evaluation."""
    content = draft.document.content
    bf16 = content.get("bf16") if content.get("bf16") is not None else content.get("bfloat16")
    fp16 = written(draft, "fp16", truth)
    name = "bf16" if content.get("bf16") is not None or "bfloat16" not in content else "bfloat16"
    text = said(draft, name) if bf16 is not None else f"bf16 is not set ({draft.source}): axolotl takes false"
    if bf16 == "auto":
        asks = Open(f"{text}: the device decides")
        value: object = False if fp16 is True else asks
        half: object = True if fp16 is True else (False if fp16 is False else asks)
    else:
        value = bf16 == "full" or truth(bf16) is True
        half = fp16 is True and not value
    for key, on in (("bf16.enabled", value), ("fp16.enabled", half)):
        draft.fill(key, on, name, text=text)
        if on is False or bf16 == "full":
            draft.assumed[key] = False
        else:
            draft.put(key, on, name, text=text)
