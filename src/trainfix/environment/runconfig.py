"""How a run is configured: a DeepSpeed JSON file as flat dotted keys, and what DeepSpeed makes of absent keys.

The defaults, the old names and the meaning of ``nvme`` are those of the released sources: ``runtime/config.py``,
``runtime/zero/config.py``, ``runtime/zero/offload_config.py``, ``runtime/zero/stage_1_and_2.py`` and
``runtime/zenflow/engine.py`` (DeepSpeed 0.14.0 to 0.19.8).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Final

STAGE = "zero_optimization.stage"
DEVICE = "zero_optimization.offload_optimizer.device"
STEPS = "gradient_accumulation_steps"
ZENFLOW = "zero_optimization.zenflow"


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

    def value(self, key: str) -> object:
        """What the run uses for `key`: the file's value, DeepSpeed's default, None if it has none, or UNKNOWN."""
        return self.setting(key).value

    def setting(self, key: str) -> Setting:
        """The value that DeepSpeed uses for `key`, with the reason as one line that names the file."""
        rule = _RULES.get(key)
        return rule(self) if rule else self._plain(key)

    def has(self, key: str) -> bool:
        """Whether the file sets `key`, a value or a section, to anything but null."""
        return self.values.get(key) is not None or any(name.startswith(key + ".") for name in self.values)

    def _plain(self, key: str, default: object = None) -> Setting:
        for name in _ancestors(key):
            if self.values.get(name) == "auto":
                return Setting(UNKNOWN, self._says(name, 'the program that starts DeepSpeed replaces "auto"'))
        if key in self.values:
            return Setting(self.values[key], self._says(key))
        return Setting(default, self._lacks(key, default))

    def _says(self, key: str, note: str = "") -> str:
        value = self.values[key]
        shown = value if isinstance(value, str) and value != "auto" else json.dumps(value)
        return f"{key} = {shown} ({self.source})" + (f": {note}" if note else "")

    def _lacks(self, key: str, default: object) -> str:
        return f"{key} is not set ({self.source})" + ("" if default is None else f": DeepSpeed takes {default}")


def _ancestors(key: str) -> Iterator[str]:
    """`key` itself, then the sections that hold it: a.b.c, a.b, a."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _stage(config: RunConfig) -> Setting:
    old = config.values.get("zero_optimization")
    if isinstance(old, bool):
        return Setting(int(old), config._says("zero_optimization", f"the old form of stage {int(old)}"))
    setting = config._plain(STAGE, default=0)
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


def _device(config: RunConfig) -> Setting:
    if config.values.get("zero_optimization.cpu_offload") is True:
        note = "the old name of offload_optimizer.device = cpu"
        return Setting("cpu", config._says("zero_optimization.cpu_offload", note))
    setting = config._plain(DEVICE, default="none")
    if setting.value == "nvme" and _stage(config).value != 3:
        # DeepSpeedZeroOptimizer sets cpu_offload for every device but none; only stage 3 has a swapper.
        note = "NVMe offload does not exist in stages 1 and 2; DeepSpeed keeps the optimizer in CPU memory, as with cpu"
        return Setting("cpu", config._says(DEVICE, note))
    if setting.value in (UNKNOWN, "none", "cpu", "nvme"):
        return setting
    return Setting(UNKNOWN, config._says(DEVICE, "DeepSpeed knows none, cpu and nvme"))


def _accumulation_steps(config: RunConfig) -> Setting:
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


_RULES: Mapping[str, Callable[[RunConfig], Setting]] = MappingProxyType(
    {STAGE: _stage, DEVICE: _device, STEPS: _accumulation_steps}
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
    try:
        names = [file.name for file in Path(path).parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(Path(path).name, names, 1)
    return f"; did you mean {Path(path).with_name(near[0])}?" if near else ""
