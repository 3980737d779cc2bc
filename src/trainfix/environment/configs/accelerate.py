"""accelerate's config file: how ``accelerate launch`` starts any program, and the DeepSpeed config that it may build.

From the released sources of accelerate 0.30.1 to 1.11.0 (``commands/launch.py``, ``commands/config/config_args.py``,
``utils/launch.py``, ``DeepSpeedPlugin`` in ``utils/dataclasses.py``). With a ``deepspeed_config_file`` the other keys
of ``deepspeed_config`` count only where that file says "auto" (accelerate refuses most of them beside it).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trainfix.environment.configs.documents import ConfigError, Document
from trainfix.environment.configs.draft import Draft
from trainfix.environment.configs.values import number, said, whole, written
from trainfix.environment.runconfig import Open, shown

KIND = "accelerate"

# accelerate's key in deepspeed_config -> DeepSpeed's, and what accelerate takes where it is absent: "auto" is for the
# program to replace.
SECTION: Mapping[str, tuple[str, object]] = MappingProxyType(
    {
        "zero_stage": ("zero_optimization.stage", 2),
        "offload_optimizer_device": ("zero_optimization.offload_optimizer.device", "none"),
        "offload_param_device": ("zero_optimization.offload_param.device", "none"),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", "auto"),
        "gradient_clipping": ("gradient_clipping", "auto"),
    }
)
# Starts one process, whatever num_processes says; YAML takes a bare NO for false.
ALONE = ("NO", "FALSE")
# Splits one model over processes: their number is not that of the data-parallel ranks.
SPLITS = ("MEGATRON_LM", "MODEL_PARALLEL")
WITHOUT = (
    *(*ALONE, *SPLITS, "DATA_PARALLEL", "FSDP", "TPU", "XLA"),
    *("MULTI_CPU", "MULTI_GPU", "MULTI_HPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_NPU", "MULTI_SDAA", "MULTI_XPU"),
)
_LAUNCHES = frozenset(
    """
    compute_environment deepspeed_config downcast_bf16 fsdp_config gpu_ids machine_rank main_training_function
    mixed_precision num_machines num_processes rdzv_backend use_cpu
    """.split()
)


def recognises(document: Document) -> bool:
    """accelerate refuses a config without distributed_type."""
    return "distributed_type" in document.content and bool(_LAUNCHES & document.content.keys())


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a launcher. Raises ConfigError where accelerate would refuse the file at once."""
    if document.content.get("distributed_type") is None:
        raise ConfigError(f"{document.path} has no distributed_type, without which accelerate refuses it; add it")
    draft = Draft(document, KIND, "launcher")
    kind = str(document.content["distributed_type"]).upper()
    _ranks(draft, kind)
    if kind not in ("DEEPSPEED", *WITHOUT):
        draft.put("deepspeed", Open(f"{said(draft, 'distributed_type')}: accelerate has no such type"))
        return (draft,)
    draft.put("deepspeed", kind == "DEEPSPEED", "distributed_type", text=said(draft, "distributed_type"))
    if kind == "DEEPSPEED":
        _deepspeed(draft)
    return (draft,)


def _deepspeed(draft: Draft) -> None:
    """The DeepSpeed config: a file, or what accelerate builds from its own section."""
    document = draft.document
    section = document.content.get("deepspeed_config") or {}
    if not isinstance(section, dict):
        draft.put("", Open(f"{said(draft, 'deepspeed_config')}: not a section"), "deepspeed_config")
        return
    file = section.get("deepspeed_config_file")
    if file and str(file).lower() != "none":
        draft.deepspeed = str(file)
        _fill(draft, section)
    else:
        draft.deepspeed = _built(document, section)
    for key, on in zip(("fp16.enabled", "bf16.enabled"), _precision(draft), strict=True):
        draft.fill(key, on, "mixed_precision", text=_mixed(draft))
        if on:
            draft.values[key] = True
        elif not isinstance(draft.deepspeed, str):  # a file has its own switch, or DeepSpeed's default
            draft.assumed[key] = False


def _ranks(draft: Draft, kind: str) -> None:
    content = draft.document.content
    if kind in ALONE:
        draft.put("ranks", 1, "distributed_type", text=f"{said(draft, 'distributed_type')} starts one process")
        return
    if kind in SPLITS or _splits(content.get("parallelism_config")):
        name = "distributed_type" if kind in SPLITS else "parallelism_config"
        why = f"{said(draft, name)}: a model may be split over processes, so their number is not that of the ranks"
        draft.put("ranks", Open(why), name)
        return
    if content.get("num_processes") is None or number(content["num_processes"]) == -1:
        why = f"num_processes is not set ({draft.source}): it is given to accelerate launch"
        draft.put("ranks", Open(why), "num_processes")
        return
    draft.put("ranks", written(draft, "num_processes", whole), "num_processes")


def _splits(section: object) -> bool:
    """Whether a parallelism_config may divide a model, or a sequence, over processes."""
    if not isinstance(section, dict):
        return bool(section)
    sizes = [value for key, value in section.items() if str(key).endswith(("tp_size", "cp_size", "sp_size"))]
    return any(whole(size) != 1 for size in sizes)


def _precision(draft: Draft) -> tuple[bool, bool]:
    """Whether accelerate switches on fp16, and bf16 (for fp8 too)."""
    content = draft.document.content
    mixed = str(content.get("mixed_precision") or ("fp16" if content.get("fp16") else "no")).lower()
    return mixed == "fp16", mixed in ("bf16", "fp8")


def _mixed(draft: Draft) -> str:
    if draft.document.content.get("mixed_precision") is not None:
        return said(draft, "mixed_precision")
    return f"mixed_precision is not set ({draft.source}): accelerate takes no"


def _built(document: Document, section: Mapping[str, object]) -> Draft:
    """The DeepSpeed config that accelerate builds from its section. It leaves the sizes of batches to the program."""
    config = Draft(document, "deepspeed", "deepspeed")
    config.put("deepspeed", True, "distributed_type", text=f"distributed_type = DEEPSPEED ({document.path})")
    for name, (key, default) in SECTION.items():
        value = _value(config, section, name, default)
        text = "" if section.get(name) is not None else _default(config, name, default)
        if name == "gradient_clipping" and value == 0:
            continue
        config.put(key, value, "deepspeed_config", name, text=text)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        config.put(key, "auto", "deepspeed_config", text=f"accelerate leaves {key} to the program ({document.path})")
    return config


def _fill(draft: Draft, section: Mapping[str, object]) -> None:
    """What accelerate puts where the DeepSpeed file says "auto"."""
    for name, (key, default) in SECTION.items():
        value = _value(draft, section, name, default)
        text = "" if section.get(name) is not None else _default(draft, name, default)
        if value != "auto":
            draft.fill(key, value, "deepspeed_config", name, text=text)


def _default(draft: Draft, name: str, default: object) -> str:
    does = "leaves it to the program" if default == "auto" else f"takes {shown(default)}"
    return f"deepspeed_config.{name} is not set ({draft.source}): accelerate {does}"


def _value(draft: Draft, section: Mapping[str, object], name: str, default: object) -> object:
    """One key of the section, which accelerate hands on as text and parses again."""
    value = section.get(name)
    if value is None:
        return default
    if isinstance(value, str) and name.endswith("_device"):
        return value.lower()
    if value == "auto" and default == "auto":
        return value
    taken = number(value)
    if name.endswith("_device") or taken is None or (name != "gradient_clipping" and taken != int(taken)):
        return Open(f"deepspeed_config.{name} = {shown(value)} ({draft.source}): nothing that accelerate takes")
    return taken if name == "gradient_clipping" else int(taken)
