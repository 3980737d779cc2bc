"""How one run is configured, as far as its files say: flat dotted keys, each value with the place that it comes from.

The keys are DeepSpeed's own (``zero_optimization.stage``), and those in `RUN_KEYS` for what DeepSpeed has no name for.
What DeepSpeed makes of absent keys is in `runconfig.deepspeed`; how files become a `RunConfig` is in `configs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

# What a run has beside DeepSpeed's keys -> in words. Where no file says it, it is UNKNOWN.
RUN_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "framework": "which program trains",
        "task": "what kind of training it is (sft, pt, dpo, ...)",
        "deepspeed": "whether DeepSpeed is used",
        "ranks": "how many data-parallel ranks there are",
        "epochs": "how many epochs there are",
        "label_smoothing_factor": "whether labels are smoothed (label_smoothing_factor)",
        "average_tokens_across_devices": "whether average_tokens_across_devices is set",
        "use_asft_loss": "whether use_asft_loss is set",
    }
)


class Unknown(Enum):
    """The type of UNKNOWN."""

    UNKNOWN = "unknown"


# The value of a key that the files leave open, such as "auto".
UNKNOWN: Final = Unknown.UNKNOWN
_NO_VERSIONS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Open:
    """Stands for a value that the files leave open. `why` is one line that names the file."""

    why: str


@dataclass(frozen=True)
class ByRelease:
    """Stands for a default that depends on the installed release of a package: `before`, and what each release of
    `since` brought, oldest first. A value may be a `ByRelease` itself."""

    package: str
    before: object
    since: tuple[tuple[str, object], ...]

    def at(self, versions: Mapping[str, str]) -> object:
        """The default with these versions, UNKNOWN where the package's is not known or cannot be ordered."""
        value: object = self.before
        for release, then in self.since:
            reached = is_since(versions.get(self.package), release)
            if reached is None:
                return UNKNOWN
            value = then if reached else value
        return value.at(versions) if isinstance(value, ByRelease) else value

    def __str__(self) -> str:
        changes = ", ".join(f"{_said(value)} from {release} on" for release, value in self.since)
        return f"{_said(self.before)} before {self.package} {self.since[0][0]}, {changes}"


@dataclass(frozen=True)
class Origin:
    """Where a value stands: the file as the user typed it (or as another file names it), the key as written there, and
    its line if the reader knows it. `text` says it in words where ``key = value`` would not."""

    file: str
    key: str
    line: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Setting:
    """What a run uses for one key (UNKNOWN when the files cannot tell), how they say so, and where."""

    value: object
    because: str
    places: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """One run. `source` names its files as the user typed them.

    `values` are under flat dotted keys; `Open` is what a file leaves open, under the empty key all that is not set
    elsewhere; `ByRelease` a default of the program; ``"auto"`` is what nobody has filled in.
    `origins` has the place of those that are not written under their own key in `source`.
    """

    source: str
    values: Mapping[str, object]
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def value(self, key: str, versions: Mapping[str, str] = _NO_VERSIONS) -> object:
        """What the run uses for `key`: the file's value, DeepSpeed's default, None if it has none, or UNKNOWN."""
        return self.setting(key, versions).value

    def setting(self, key: str, versions: Mapping[str, str] = _NO_VERSIONS) -> Setting:
        """The value that the run uses for `key` with these packages (name -> version), and the reason as one line.

        Without a package's version, a default that depends on it is UNKNOWN.
        """
        from trainfix.environment.runconfig.deepspeed import setting

        value = self.values.get(key)
        if isinstance(value, ByRelease):
            return self.said(key, value=value.at(versions))
        if key not in RUN_KEYS:
            return setting(self, key, versions)
        if key in self.values:
            return self.plain(key)
        return Setting(UNKNOWN, f"{self.source} does not say {RUN_KEYS[key]}")

    def has(self, key: str) -> bool:
        """Whether the files set `key`, a value or a section, to anything but null."""
        return self.values.get(key) is not None or any(name.startswith(key + ".") for name in self.values)

    def plain(self, key: str, default: object = None, note: str = "") -> Setting:
        """The value as written, or else `default`, of which `note` says more."""
        value = self.values.get(key)
        if key in self.values and value != "auto" and not isinstance(value, Open):
            return self.said(key, value=value)
        for name in _ancestors(key):
            value = self.values.get(name)
            if value == "auto":
                return self.said(name, 'the program that starts DeepSpeed replaces "auto"', value=UNKNOWN)
            if isinstance(value, Open):
                return Setting(UNKNOWN, value.why, (self.origin(name),))
        return Setting(default, self.lacks(key, default, note))

    def said(self, key: str, note: str = "", *, value: object) -> Setting:
        """`value`, because of what the files say of `key`."""
        return Setting(value, self.says(key, note), (self.origin(key),))

    def says(self, key: str, note: str = "") -> str:
        """What the files say of `key`, which they set: one line that names the file."""
        origin, value = self.origin(key), self.values[key]
        written = value.why if isinstance(value, Open) else f"{origin.key} = {shown(value)} ({origin.file})"
        return (origin.text or written) + (f": {note}" if note else "")

    def origin(self, key: str) -> Origin:
        """Where `key` stands."""
        return self.origins.get(key) or Origin(self.source, key)

    def lacks(self, key: str, default: object, note: str = "") -> str:
        """What is said of `key`, which the files do not set: `default` holds."""
        if default is None:
            return f"{key} is not set ({self.source})"
        return f"{key} is not set ({self.source}): " + (
            note if default is UNKNOWN else f"DeepSpeed takes {shown(default)}{note}"
        )


def shown(value: object) -> str:
    """A value as a JSON file has it, a word without its quotes."""
    if isinstance(value, (Open, ByRelease)):
        return str(value) if isinstance(value, ByRelease) else "unknown"
    return value if isinstance(value, str) and value != "auto" else json.dumps(value, default=str)


def _said(value: object) -> str:
    return f"({value})" if isinstance(value, ByRelease) else shown(value)


def instead(setting: Setting, value: object, because: str = "") -> Setting:
    """Another value for the same reasons, or with other words for them."""
    return replace(setting, value=value, because=because or setting.because)


def is_since(release: str | None, since: str) -> bool | None:
    """Whether `release` is `since` or newer; None where that cannot be told."""
    from packaging.version import InvalidVersion, Version

    try:
        return None if release is None else Version(release) >= Version(since)
    except InvalidVersion:
        return None


def _ancestors(key: str) -> Iterator[str]:
    """`key` itself, then the sections that hold it, the whole at last: a.b.c, a.b, a, and the empty name."""
    while key:
        yield key
        key = key.rpartition(".")[0]
    yield key
