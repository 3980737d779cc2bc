"""How a run is configured: a DeepSpeed JSON file as flat dotted keys, and what DeepSpeed makes of absent keys.

The defaults, the old names and the meaning of ``nvme`` are those of the released sources: ``runtime/config.py``,
``runtime/constants.py``, ``runtime/precision_config.py``, ``runtime/zero/config.py``,
``runtime/zero/offload_config.py``, ``runtime/zero/stage_1_and_2.py``, ``runtime/engine.py`` and
``runtime/zenflow/engine.py`` (DeepSpeed 0.14.0 to 0.19.8).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Final

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


class ConfigError(Exception):
    """A config file cannot be read. The message names the file, the place in it and the next step."""


class Unknown(Enum):
    """The type of UNKNOWN."""

    UNKNOWN = "unknown"


# The value of a key that the file leaves open, such as "auto".
UNKNOWN: Final = Unknown.UNKNOWN


@dataclass(frozen=True)
class Setting:
    """What a run uses for one key (UNKNOWN when the file cannot tell), and how the file says so."""

    value: object
    because: str


@dataclass(frozen=True)
class RunConfig:
    """One DeepSpeed config. `source` is the file as the user typed it, `values` its content under flat dotted keys."""

    source: str
    values: Mapping[str, object]

    def value(self, key: str, release: str | None = None) -> object:
        """What the run uses for `key`: the file's value, DeepSpeed's default, None if it has none, or UNKNOWN."""
        return self.setting(key, release).value

    def setting(self, key: str, release: str | None = None) -> Setting:
        """The value that DeepSpeed `release` uses for `key`, with the reason as one line that names the file.

        Without a release, a default that depends on it is UNKNOWN.
        """
        rule = _RULES.get(key)
        if rule is not None:
            return rule(self, release)
        if key in CHANGED_DEFAULTS:
            return _typed(self, self._renamed(key), *_changed(key, release))
        return _typed(self, self._renamed(key), DEFAULTS.get(key))

    def has(self, key: str) -> bool:
        """Whether the file sets `key`, a value or a section, to anything but null."""
        return self.values.get(key) is not None or any(name.startswith(key + ".") for name in self.values)

    def sets(self, key: str) -> bool:
        """Whether the file decides `key`: it sets it, under whichever name, or leaves it to the program by "auto"."""
        name = self._renamed(key)
        return self.has(name) or any(self.values.get(one) == "auto" for one in _ancestors(name))

    def _renamed(self, key: str) -> str:
        """The name under which DeepSpeed would read `key` in this file."""
        section, _, rest = key.partition(".")
        old = OLD_SECTIONS.get(section)
        return f"{old}.{rest}" if old and self.has(old) and not self.has(section) else key

    def _plain(self, key: str, default: object = None, note: str = "") -> Setting:
        for name in _ancestors(key):
            if self.values.get(name) == "auto":
                return Setting(UNKNOWN, self._says(name, 'the program that starts DeepSpeed replaces "auto"'))
        if key in self.values:
            return Setting(self.values[key], self._says(key))
        return Setting(default, self._lacks(key, default, note))

    def _says(self, key: str, note: str = "") -> str:
        return f"{key} = {shown(self.values[key])} ({self.source})" + (f": {note}" if note else "")

    def _lacks(self, key: str, default: object, note: str = "") -> str:
        if default is None:
            return f"{key} is not set ({self.source})"
        return f"{key} is not set ({self.source}): " + (
            note if default is UNKNOWN else f"DeepSpeed takes {shown(default)}{note}"
        )


def shown(value: object) -> str:
    """A value as a JSON file has it, a word without its quotes."""
    return value if isinstance(value, str) and value != "auto" else json.dumps(value)


def _ancestors(key: str) -> Iterator[str]:
    """`key` itself, then the sections that hold it: a.b.c, a.b, a."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _typed(config: RunConfig, key: str, default: object, note: str = "") -> Setting:
    """The file's value for `key`, UNKNOWN if it is not of the default's kind: DeepSpeed's own readers differ there."""
    setting = config._plain(key, default, note)
    if setting.value is UNKNOWN or setting.value is default or not isinstance(default, (bool, int, float)):
        return setting
    if isinstance(default, bool):
        if setting.value in (True, False):
            return Setting(bool(setting.value), setting.because)
        return Setting(UNKNOWN, config._says(key, "neither true nor false"))
    if isinstance(setting.value, (int, float)) and not isinstance(setting.value, bool):
        return setting
    return Setting(UNKNOWN, config._says(key, "not a number"))


def _changed(key: str, release: str | None) -> tuple[object, str]:
    """The default that `release` has for `key`, and what to say of it."""
    before, (since, after) = CHANGED_DEFAULTS[key]
    newer = is_since(release, since)
    if newer is None:
        return UNKNOWN, f"DeepSpeed takes {shown(before)} before {since}, {shown(after)} from there on"
    return (after, f" from {since} on") if newer else (before, f" before {since}")


def is_since(release: str | None, since: str) -> bool | None:
    """Whether `release` is `since` or newer; None where that cannot be told."""
    from packaging.version import InvalidVersion, Version

    try:
        return None if release is None else Version(release) >= Version(since)
    except InvalidVersion:
        return None


def _stage(config: RunConfig, release: str | None = None) -> Setting:
    old = config.values.get("zero_optimization")
    if isinstance(old, bool):
        return Setting(int(old), config._says("zero_optimization", f"the old form of stage {int(old)}"))
    setting = config._plain(STAGE, DEFAULTS[STAGE])
    number = _integer(setting.value)
    if setting.value is UNKNOWN or number in (0, 1, 2, 3):
        return Setting(setting.value if number is None else number, setting.because)
    return Setting(UNKNOWN, config._says(STAGE, "DeepSpeed knows 0, 1, 2 and 3"))


def _integer(value: object) -> int | None:
    """What pydantic makes of a stage: 2, 2.0, "2" and true are integers there."""
    try:
        return int(value) if isinstance(value, (int, float, str)) and float(value) == int(value) else None
    except (ValueError, OverflowError):
        return None


def _device(config: RunConfig, release: str | None = None) -> Setting:
    setting = _offload_device(config, "offload_optimizer", "cpu_offload")
    stage = _stage(config).value
    if setting.value != "nvme" or stage == 3:
        return setting
    if stage is UNKNOWN:
        return Setting(UNKNOWN, config._says(DEVICE, "taken as cpu below stage 3, and the stage is not known"))
    # DeepSpeedZeroOptimizer sets cpu_offload for every device but none; only stage 3 has a swapper.
    note = "NVMe offload does not exist in stages 1 and 2; DeepSpeed keeps the optimizer in CPU memory, as with cpu"
    return Setting("cpu", config._says(DEVICE, note))


def _parameter_device(config: RunConfig, release: str | None = None) -> Setting:
    return _offload_device(config, "offload_param", "cpu_offload_param")


def _offload_device(config: RunConfig, section: str, old: str) -> Setting:
    if config.values.get(f"zero_optimization.{old}") is True:
        return Setting("cpu", config._says(f"zero_optimization.{old}", f"the old name of {section}.device = cpu"))
    key = f"zero_optimization.{section}.device"
    setting = config._plain(key, DEFAULTS[key])
    if setting.value in (UNKNOWN, "none", "cpu", "nvme"):
        return setting
    return Setting(UNKNOWN, config._says(key, "DeepSpeed knows none, cpu and nvme"))


def _overlap(config: RunConfig, release: str | None = None) -> Setting:
    if config._plain(OVERLAP).value is not None:
        return _typed(config, OVERLAP, False)
    stage = _stage(config)
    if stage.value is UNKNOWN:
        return stage
    default = stage.value == 3
    return Setting(default, config._lacks(OVERLAP, default, " in stage 3" if default else " below stage 3"))


def _contiguous(config: RunConfig, release: str | None = None) -> Setting:
    """Stages 1 and 2 use one buffer for all gradients whenever they offload."""
    setting = _typed(config, CONTIGUOUS, DEFAULTS[CONTIGUOUS])
    if setting.value is not False or _stage(config).value == 3:
        return setting
    device, stage = _device(config), _stage(config)
    if UNKNOWN in (device.value, stage.value):
        return Setting(UNKNOWN, (device if device.value is UNKNOWN else stage).because)
    if device.value != "none":
        return Setting(True, config._says(CONTIGUOUS, "taken as true: stages 1 and 2 need it for offloading"))
    return setting


def _zenflow(config: RunConfig, release: str | None = None) -> Setting:
    setting = config._plain(ZENFLOW)
    if setting.value is UNKNOWN:
        return setting
    if config.has(ZENFLOW):
        return Setting(True, f"{ZENFLOW} is set ({config.source})")
    return Setting(False, setting.because)


def _type(config: RunConfig, key: str) -> Setting:
    """A data type under DeepSpeed's own short name; None if the file sets none."""
    setting = config._plain(key)
    if setting.value is UNKNOWN or setting.value is None:
        return setting
    for name, names in _TYPES.items():
        if setting.value in names:
            return Setting(name, setting.because)
    return Setting(UNKNOWN, config._says(key, f"DeepSpeed knows {', '.join(_TYPES)}"))


def _autocast_type(config: RunConfig, release: str | None = None) -> Setting:
    return _type(config, "torch_autocast.dtype")


def _model_type(config: RunConfig, release: str | None = None) -> Setting:
    """The parameters' type follows fp16.enabled and bf16.enabled; DeepSpeed refuses any other value."""
    switches = {name: config.setting(f"{name}.enabled") for name in ("fp16", "bf16")}
    for name, switch in switches.items():
        if switch.value is True:
            return Setting(name, switch.because)
    for switch in switches.values():
        if switch.value is UNKNOWN:
            return switch
    return Setting("fp32", f"neither fp16.enabled nor bf16.enabled is true ({config.source}): DeepSpeed takes fp32")


def _accumulation_type(config: RunConfig, release: str | None = None) -> Setting:
    """Where the file sets none, the model's own type, but for bf16 without ZeRO before 0.17.6."""
    given, model, stage = _type(config, ACCUMULATION_TYPE), _model_type(config), _stage(config)
    if given.value is not None:
        return given
    newer = is_since(release, "0.17.6")
    if model.value != "bf16" or newer or (stage.value is not UNKNOWN and stage.value != 0):
        return Setting(model.value, f"{given.because}; {model.because}")
    if newer is None or stage.value is UNKNOWN:
        old = "DeepSpeed before 0.17.6 takes fp32 without ZeRO, bf16 with it"
        return Setting(UNKNOWN, f"{given.because}: {old}; {stage.because}")
    return Setting("fp32", f"{given.because}: DeepSpeed before 0.17.6 takes fp32 for bf16 without ZeRO")


def _managed(config: RunConfig, release: str | None = None) -> Setting:
    """Whether the engine counts the micro-batches of a window itself."""
    setting, reads = _typed(config, MANAGED, DEFAULTS[MANAGED]), is_since(release, "0.19.4")
    if setting.value is True or reads:
        return setting
    because = config._says(MANAGED, "DeepSpeed before 0.19.4 does not read it")
    return Setting(UNKNOWN if reads is None else True, because)


def _optimizer(config: RunConfig, release: str | None = None) -> Setting:
    """The optimizer that DeepSpeed builds; ``torch_adam`` is torch's own, None the one that the program passes."""
    setting = config._plain("optimizer.type")
    name = setting.value.lower() if isinstance(setting.value, str) else setting.value
    if name in ("adam", "adamw") and config.values.get("optimizer.params.torch_adam") is True:
        return Setting("torch_adam", f"{setting.because}, {config._says('optimizer.params.torch_adam')}")
    return Setting(name, setting.because) if name in _OPTIMIZERS else setting


def _stairs(config: RunConfig, release: str | None = None) -> Setting:
    """The stairs of OneCycle's first half, or of the second where only that has any."""
    first, second = STAIRS, STAIRS.replace("first", "second")
    steps = _typed(config, first, 0)
    return steps if steps.value or config._plain(second).value is None else _typed(config, second, 0)


def _accumulation_steps(config: RunConfig, release: str | None = None) -> Setting:
    """The length of the window, in micro-batches, as DeepSpeed derives it."""
    if config.has(ZENFLOW):
        return _zenflow_interval(config)
    if config.values.get("elasticity.enabled") is True:
        return Setting(UNKNOWN, config._says("elasticity.enabled", f"elastic training chooses {STEPS}"))
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
    return Setting(setting.value, f"{setting.because}: ZenFlow takes it in place of {STEPS}")


def _positive(config: RunConfig, key: str) -> Setting:
    setting = config._plain(key)
    number = setting.value
    if number is UNKNOWN or (isinstance(number, int) and not isinstance(number, bool) and number > 0):
        return setting
    return Setting(UNKNOWN, config._says(key, "not a positive whole number"))


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
    if config.values[total] == "auto":
        return Setting(UNKNOWN, f'{missing}, and {total} is "auto"')
    if micro not in given:
        return Setting(1, f"{missing}: DeepSpeed takes 1, as {micro} is not set either")
    sizes = f"{total} {json.dumps(config.values[total])} / {micro} {json.dumps(config.values[micro])}"
    return Setting(UNKNOWN, f"{missing}: DeepSpeed takes {sizes} / number of ranks, which the file does not say")


_RULES: Mapping[str, Callable[[RunConfig, str | None], Setting]] = MappingProxyType(
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


def load(path: str) -> RunConfig:
    """The DeepSpeed config in the JSON file `path`. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: name the DeepSpeed JSON file itself{_inside(path)}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path}: no such file{_beside(path)}; name the DeepSpeed JSON file that the run uses"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): name a DeepSpeed JSON file") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {why}; make it readable, or name another file") from None
    content = _parse(path, text)
    if not isinstance(content, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(content), "a single value")
        raise ConfigError(f"{path} holds {kind}: a DeepSpeed config is one JSON object, {{...}}")
    return RunConfig(source=path, values=MappingProxyType(dict(_flat(content))))


def _parse(path: str, text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"{path}: the key {twice!r} stands twice in one object, which DeepSpeed refuses; remove one"
            )
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        raise ConfigError(
            f"{path}, line {error.lineno} column {error.colno}: {_advice(path, line, error.msg)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a usable JSON file ({error}): correct it") from None


def _advice(path: str, line: str, message: str) -> str:
    if path.endswith((".yaml", ".yml")):
        return "not JSON but YAML, as the name says; name the DeepSpeed JSON file that it points to"
    if "//" in line or "#" in line or "/*" in line:
        return "not valid JSON: it has no comments (DeepSpeed's own reader skips them); remove the comment"
    return f"not valid JSON ({message}); correct it there"


def _flat(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Flat dotted keys. An empty section stays as a value, so that its presence is seen."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _inside(folder: str) -> str:
    found = sorted(str(file) for file in Path(folder).glob("*.json"))
    return f"; it holds {', '.join(found[:5])}" if found else ""


def _beside(path: str) -> str:
    from difflib import get_close_matches

    try:
        names = [file.name for file in Path(path).parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(Path(path).name, names, 1)
    return f"; did you mean {Path(path).with_name(near[0])}?" if near else ""
