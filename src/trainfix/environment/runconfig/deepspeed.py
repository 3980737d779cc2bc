"""What DeepSpeed makes of a config: defaults of absent keys, old names, and values that follow from others.

They are those of the released sources: ``runtime/config.py``, ``runtime/constants.py``,
``runtime/precision_config.py``, ``runtime/zero/config.py``, ``runtime/zero/offload_config.py``,
``runtime/zero/stage_1_and_2.py``, ``runtime/engine.py`` and ``runtime/zenflow/engine.py`` (DeepSpeed 0.14.0 to 0.19.8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from trainfix.environment.runconfig import UNKNOWN, Open, RunConfig, Setting, instead, is_since, shown

_NONE: Mapping[str, str] = MappingProxyType({})

STAGE = "zero_optimization.stage"
DEVICE = "zero_optimization.offload_optimizer.device"
STEPS = "gradient_accumulation_steps"
ZENFLOW = "zero_optimization.zenflow"
OVERLAP = "zero_optimization.overlap_comm"
CONTIGUOUS = "zero_optimization.contiguous_gradients"
MODEL_TYPE = "data_types.param_dtype"
ACCUMULATION_TYPE = "data_types.grad_accum_dtype"
MANAGED = "managed_gradient_accumulation"
CLIPPING = "gradient_clipping"
STAIRS = "scheduler.params.cycle_first_stair_count"


# What DeepSpeed takes for an absent key. A key that is not here and has no rule below has no default.
DEFAULTS: Mapping[str, object] = MappingProxyType(
    {
        STAGE: 0,
        DEVICE: "none",
        CONTIGUOUS: True,
        "amp.enabled": False,
        "bf16.enabled": False,
        "compile.deepcompile": False,
        "fp16.auto_cast": False,
        "fp16.enabled": False,
        "fp16.loss_scale": 0,
        "gradient_predivide_factor": 1.0,
        MANAGED: True,
        "optimizer.legacy_fusion": False,
        "prescale_gradients": False,
        "sparse_gradients": False,
        "torch_autocast.enabled": False,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": True,
        "zero_optimization.elastic_checkpoint": False,
        "zero_optimization.ignore_unused_parameters": True,
        "zero_optimization.offload_optimizer.ratio": 1.0,
        "zero_optimization.offload_optimizer.super_offload": False,
        "zero_optimization.offload_param.device": "none",
        "zero_optimization.reduce_scatter": True,
        "zero_optimization.round_robin_gradients": False,
        "zero_optimization.use_multi_rank_bucket_allreduce": True,
        "zero_optimization.zero_hpz_partition_size": 1,
        "zero_optimization.zero_quantized_gradients": False,
        "zero_optimization.zero_quantized_weights": False,
    }
)
# The same where it changed: the default before, then (release, default from there on).
CHANGED_DEFAULTS: Mapping[str, tuple[object, tuple[str, object]]] = MappingProxyType(
    {
        CLIPPING: (0.0, ("0.19.3", 1.0)),
        "bf16.check_grad_overflow": (False, ("0.19.3", True)),
        "zero_optimization.offload_optimizer.pin_memory": (False, ("0.19.5", True)),
        "zero_optimization.offload_param.pin_memory": (False, ("0.19.5", True)),
    }
)
# Sections that DeepSpeed still reads under an old name, where the new one is missing.
OLD_SECTIONS: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16"})
# DeepSpeed's names for data types, and the ones that it takes too (`DtypeEnum`).
_TYPES = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}
# The optimizers that DeepSpeed builds itself, which it knows in either case.
_OPTIMIZERS = (
    *("adam", "adamw", "lamb", "adagrad", "lion", "muon"),
    *("onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd"),
)


def setting(config: RunConfig, key: str, versions: Mapping[str, str]) -> Setting:
    """See `RunConfig.setting`."""
    rule = _RULES.get(key)
    if rule is not None:
        return rule(config, versions)
    if key in CHANGED_DEFAULTS:
        return _typed(config, _renamed(config, key), *_changed(key, versions.get("deepspeed")))
    return _typed(config, _renamed(config, key), DEFAULTS.get(key))


def decides(config: RunConfig, key: str) -> bool:
    """Whether the files decide `key`: they set it, under whichever name, or leave it to the program by "auto"."""
    name = _renamed(config, key)
    sections = [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)]
    return config.has(name) or any(config.values.get(one) == "auto" for one in sections)


def _renamed(config: RunConfig, key: str) -> str:
    """The name under which DeepSpeed would read `key` in these files."""
    section, _, rest = key.partition(".")
    old = OLD_SECTIONS.get(section)
    return f"{old}.{rest}" if old and config.has(old) and not config.has(section) else key


def _typed(config: RunConfig, key: str, default: object, note: str = "") -> Setting:
    """The file's value for `key`, UNKNOWN if it is not of the default's kind: DeepSpeed's own readers differ there."""
    setting = config.plain(key, default, note)
    if setting.value is UNKNOWN or setting.value is default or not isinstance(default, (bool, int, float)):
        return setting
    if isinstance(default, bool):
        if setting.value in (True, False):
            return instead(setting, bool(setting.value))
        return config.said(key, "neither true nor false", value=UNKNOWN)
    if isinstance(setting.value, (int, float)) and not isinstance(setting.value, bool):
        return setting
    return config.said(key, "not a number", value=UNKNOWN)


def _changed(key: str, release: str | None) -> tuple[object, str]:
    """The default that `release` has for `key`, and what to say of it."""
    before, (since, after) = CHANGED_DEFAULTS[key]
    newer = is_since(release, since)
    if newer is None:
        return UNKNOWN, f"DeepSpeed takes {shown(before)} before {since}, {shown(after)} from there on"
    return (after, f" from {since} on") if newer else (before, f" before {since}")


def _stage(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    old = config.values.get("zero_optimization")
    if isinstance(old, bool):
        return config.said("zero_optimization", f"the old form of stage {int(old)}", value=int(old))
    setting = config.plain(STAGE, DEFAULTS[STAGE])
    number = _integer(setting.value)
    if setting.value is UNKNOWN or number in (0, 1, 2, 3):
        return instead(setting, setting.value if number is None else number)
    return config.said(STAGE, "DeepSpeed knows 0, 1, 2 and 3", value=UNKNOWN)


def _integer(value: object) -> int | None:
    """What pydantic makes of a stage: 2, 2.0, "2" and true are integers there."""
    try:
        return int(value) if isinstance(value, (int, float, str)) and float(value) == int(value) else None
    except (ValueError, OverflowError):
        return None


def _device(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    setting = _offload_device(config, "offload_optimizer", "cpu_offload")
    stage = _stage(config).value
    if setting.value != "nvme" or stage == 3:
        return setting
    if stage is UNKNOWN:
        return config.said(DEVICE, "taken as cpu below stage 3, and the stage is not known", value=UNKNOWN)
    # DeepSpeedZeroOptimizer sets cpu_offload for every device but none; only stage 3 has a swapper.
    note = "NVMe offload does not exist in stages 1 and 2; DeepSpeed keeps the optimizer in CPU memory, as with cpu"
    return config.said(DEVICE, note, value="cpu")


def _parameter_device(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    return _offload_device(config, "offload_param", "cpu_offload_param")


def _offload_device(config: RunConfig, section: str, old: str) -> Setting:
    if config.values.get(f"zero_optimization.{old}") is True:
        return config.said(f"zero_optimization.{old}", f"the old name of {section}.device = cpu", value="cpu")
    key = f"zero_optimization.{section}.device"
    setting = config.plain(key, DEFAULTS[key])
    if setting.value in (UNKNOWN, "none", "cpu", "nvme"):
        return setting
    return config.said(key, "DeepSpeed knows none, cpu and nvme", value=UNKNOWN)


def _overlap(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    if config.plain(OVERLAP).value is not None:
        return _typed(config, OVERLAP, False)
    stage = _stage(config)
    if stage.value is UNKNOWN:
        return stage
    default = stage.value == 3
    return Setting(default, config.lacks(OVERLAP, default, " in stage 3" if default else " below stage 3"))


def _contiguous(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """Stages 1 and 2 use one buffer for all gradients whenever they offload."""
    setting = _typed(config, CONTIGUOUS, DEFAULTS[CONTIGUOUS])
    if setting.value is not False or _stage(config).value == 3:
        return setting
    device, stage = _device(config), _stage(config)
    if UNKNOWN in (device.value, stage.value):
        return instead(device if device.value is UNKNOWN else stage, UNKNOWN)
    if device.value != "none":
        return config.said(CONTIGUOUS, "taken as true: stages 1 and 2 need it for offloading", value=True)
    return setting


def _zenflow(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    setting = config.plain(ZENFLOW)
    if setting.value is UNKNOWN:
        return setting
    if config.has(ZENFLOW):
        return Setting(True, f"{ZENFLOW} is set ({config.source})", (config.origin(ZENFLOW),))
    return instead(setting, False)


def _type(config: RunConfig, key: str) -> Setting:
    """A data type under DeepSpeed's own short name; None if the file sets none."""
    setting = config.plain(key)
    if setting.value is UNKNOWN or setting.value is None:
        return setting
    for name, names in _TYPES.items():
        if setting.value in names:
            return instead(setting, name)
    return config.said(key, f"DeepSpeed knows {', '.join(_TYPES)}", value=UNKNOWN)


def _autocast_type(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    return _type(config, "torch_autocast.dtype")


def _model_type(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """The parameters' type follows fp16.enabled and bf16.enabled; DeepSpeed refuses any other value."""
    switches = {name: config.setting(f"{name}.enabled", versions) for name in ("fp16", "bf16")}
    for name, switch in switches.items():
        if switch.value is True:
            return instead(switch, name)
    for switch in switches.values():
        if switch.value is UNKNOWN:
            return switch
    return Setting("fp32", f"neither fp16.enabled nor bf16.enabled is true ({config.source}): DeepSpeed takes fp32")


def _accumulation_type(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """Where the file sets none, the model's own type, but for bf16 without ZeRO before 0.17.6."""
    given, model, stage = _type(config, ACCUMULATION_TYPE), _model_type(config, versions), _stage(config)
    if given.value is not None:
        return given
    newer = is_since(versions.get("deepspeed"), "0.17.6")
    if model.value != "bf16" or newer or (stage.value is not UNKNOWN and stage.value != 0):
        return instead(model, model.value, f"{given.because}; {model.because}")
    if newer is None or stage.value is UNKNOWN:
        old = "DeepSpeed before 0.17.6 takes fp32 without ZeRO, bf16 with it"
        return instead(stage, UNKNOWN, f"{given.because}: {old}; {stage.because}")
    return instead(model, "fp32", f"{given.because}: DeepSpeed before 0.17.6 takes fp32 for bf16 without ZeRO")


def _managed(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """Whether the engine counts the micro-batches of a window itself."""
    setting, reads = _typed(config, MANAGED, DEFAULTS[MANAGED]), is_since(versions.get("deepspeed"), "0.19.4")
    if setting.value is True or reads:
        return setting
    return config.said(MANAGED, "DeepSpeed before 0.19.4 does not read it", value=UNKNOWN if reads is None else True)


def _optimizer(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """The optimizer that DeepSpeed builds; ``torch_adam`` is torch's own, None the one that the program passes."""
    setting = config.plain("optimizer.type")
    name = setting.value.lower() if isinstance(setting.value, str) else setting.value
    if name in ("adam", "adamw") and config.values.get("optimizer.params.torch_adam") is True:
        return instead(setting, "torch_adam", f"{setting.because}, {config.says('optimizer.params.torch_adam')}")
    return instead(setting, name) if name in _OPTIMIZERS else setting


def _stairs(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """The stairs of OneCycle's first half, or of the second where only that has any."""
    first, second = STAIRS, STAIRS.replace("first", "second")
    steps = _typed(config, first, 0)
    return steps if steps.value or config.plain(second).value is None else _typed(config, second, 0)


def _accumulation_steps(config: RunConfig, versions: Mapping[str, str] = _NONE) -> Setting:
    """The length of the window, in micro-batches, as DeepSpeed derives it."""
    if config.has(ZENFLOW):
        return _zenflow_interval(config)
    if config.values.get("elasticity.enabled") is True:
        return config.said("elasticity.enabled", f"elastic training chooses {STEPS}", value=UNKNOWN)
    if config.values.get(STEPS) is not None:
        return _positive(config, STEPS)
    return _derived_steps(config)


def _zenflow_interval(config: RunConfig) -> Setting:
    key = f"{ZENFLOW}.update_interval"
    if config.values.get(key, "auto") == "auto":
        return Setting(
            UNKNOWN, f"{key} is auto ({config.source}): ZenFlow chooses the length of the window while it trains"
        )
    setting = _positive(config, key)
    return instead(setting, setting.value, f"{setting.because}: ZenFlow takes it in place of {STEPS}")


def _positive(config: RunConfig, key: str) -> Setting:
    setting = config.plain(key)
    number = setting.value
    if number is UNKNOWN or (isinstance(number, int) and not isinstance(number, bool) and number > 0):
        return setting
    return config.said(key, "not a positive whole number", value=UNKNOWN)


def _derived_steps(config: RunConfig) -> Setting:
    total, micro = "train_batch_size", "train_micro_batch_size_per_gpu"
    missing = f"{STEPS} is not set ({config.source})"
    given = [key for key in (total, micro) if config.values.get(key) is not None]
    if total not in given and micro not in given:
        return Setting(
            UNKNOWN, f"{missing}, and neither is {total} nor {micro}: the program that starts DeepSpeed adds them"
        )
    if total not in given:
        return Setting(1, f"{missing}: DeepSpeed takes 1, as {total} is not set either")
    if config.values[total] == "auto" or isinstance(config.values[total], Open):
        return instead(config.plain(total), UNKNOWN, f"{missing}, and {total} is {shown(config.values[total])}")
    if micro not in given:
        return Setting(1, f"{missing}: DeepSpeed takes 1, as {micro} is not set either")
    sizes = f"{total} {shown(config.values[total])} / {micro} {shown(config.values[micro])}"
    steps = _quotient(*(config.value(key) for key in (total, micro, "ranks")))
    if steps is not None:
        return config.said(total, f"{missing}: DeepSpeed takes {sizes} / {config.value('ranks')} ranks", value=steps)
    return config.said(
        total, f"{missing}: DeepSpeed takes {sizes} / number of ranks, which the file does not say", value=UNKNOWN
    )


def _quotient(total: object, micro: object, ranks: object) -> int | None:
    """The micro-batches of a window, where all three sizes are known and fit."""
    if not (isinstance(total, int) and isinstance(micro, int) and isinstance(ranks, int)):
        return None
    return total // (micro * ranks) if micro * ranks > 0 and total % (micro * ranks) == 0 else None


_RULES: Mapping[str, Callable[[RunConfig, Mapping[str, str]], Setting]] = MappingProxyType(
    {
        STAGE: _stage,
        DEVICE: _device,
        STEPS: _accumulation_steps,
        OVERLAP: _overlap,
        CONTIGUOUS: _contiguous,
        ZENFLOW: _zenflow,
        MODEL_TYPE: _model_type,
        ACCUMULATION_TYPE: _accumulation_type,
        MANAGED: _managed,
        STAIRS: _stairs,
        "optimizer.type": _optimizer,
        "torch_autocast.dtype": _autocast_type,
        "zero_optimization.offload_param.device": _parameter_device,
    }
)
