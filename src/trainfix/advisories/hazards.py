"""Hazards: what a release changes silently in training, by another default or without any option.

The table is ``hazards.json``. A row has the release that changed it, what DeepSpeed does since and did before, the
upstream change, and where they matter: the key with its defaults, other keys that decide it as well (``unless``), and
triggers as in the advisories' records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from trainfix.advisories import RecordError, Trigger, trigger_of
from trainfix.advisories.reach import condition, reach
from trainfix.environment.runconfig import RunConfig, is_since, shown
from trainfix.environment.runconfig.deepspeed import decides

TABLE = Path(__file__).with_name("hazards.json")
_NAMES = {"deepspeed": "DeepSpeed"}


@dataclass(frozen=True)
class Hazard:
    """One silent change. `key` is None where no option decides it; `affects` is what differs."""

    package: str
    release: str
    does: str
    did: str
    url: str
    key: str | None = None
    before: object = None
    after: object = None
    affects: Literal["numbers", "memory"] = "numbers"
    unless: tuple[str, ...] = ()
    triggers: tuple[Trigger, ...] = ()

    @property
    def change(self) -> str:
        """What to expect of moving past the release, in one sentence."""
        number = re.search(r"/pull/(\d+)$", self.url)
        since = f"from {self.release}" + (f" (#{number[1]})" if number else "")
        news = f"{self.name} {self.does}; before, {self.did}{self._where}"
        if self.key is None:
            return f"{since} {news}"
        return f"{self.key} defaults to {shown(self.after)} instead of {shown(self.before)} {since}: {news}"

    def in_force(self, installed: str, config: str) -> str:
        """What the installed release does with the file `config`, which does not set the key, in one sentence."""
        news = f"{self.name} {installed} {self.does}; before {self.release} {self.did}{self._where}"
        return f"{self.key} is not set ({config}): {news}"

    @property
    def name(self) -> str:
        """The package as it is written in a sentence."""
        return _NAMES.get(self.package, self.package)

    @property
    def _where(self) -> str:
        return f" (only if {', '.join(map(condition, self.triggers))})" if self.triggers else ""


@lru_cache(maxsize=1)
def load_all() -> tuple[Hazard, ...]:
    """Every hazard, ordered by release. Raises RecordError if the table cannot be read."""
    from packaging.version import Version

    repair = "it is part of trainfix; reinstall it with `pip install --force-reinstall --no-deps trainfix`"
    try:
        rows = [_hazard(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]
        return tuple(sorted(rows, key=lambda one: Version(one.release)))
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"cannot read the table {TABLE}: {error}; {repair}") from error


def _hazard(*, triggers: Sequence[dict[str, Any]] = (), unless: Sequence[str] = (), **fields: Any) -> Hazard:
    return Hazard(**fields, unless=tuple(unless), triggers=tuple(trigger_of(**trigger) for trigger in triggers))


def between(package: str, installed: str, target: str, configs: Sequence[RunConfig] = ()) -> tuple[Hazard, ...]:
    """What changes silently on the way from the installed release to `target`, which is included.

    With `configs`, only what one of them leaves to a default and may reach; its triggers are those left open.
    """
    passed = [
        one
        for one in load_all()
        if one.package == package and is_since(installed, one.release) is False and is_since(target, one.release)
    ]
    if not configs:
        return tuple(passed)
    left = [[found for config in configs if (found := _left_open(one, config, target))] for one in passed]
    return tuple(min(found, key=lambda one: len(one.triggers)) for found in left if found)


def in_force(package: str, installed: str, config: RunConfig) -> tuple[Hazard, ...]:
    """The changed defaults of the installed release that rule the run, because `config` leaves them implicit.

    Their triggers are those that the file leaves open.
    """
    past = (one for one in load_all() if one.package == package and is_since(installed, one.release) is not False)
    left = (_left_open(one, config, installed) for one in past if one.key is not None)
    return tuple(one for one in left if one is not None)


def _left_open(hazard: Hazard, config: RunConfig, release: str) -> Hazard | None:
    """The hazard with the triggers that the file leaves open; None if the file decides it, or rules it out."""
    if config.value("deepspeed") is False:
        return None
    if any(decides(config, key) for key in (hazard.key, *hazard.unless) if key is not None):
        return None
    answers = [(one, reach([one], config, {hazard.package: release}).reachable) for one in hazard.triggers]
    if any(answer == "no" for _, answer in answers):
        return None
    return replace(hazard, triggers=tuple(one for one, answer in answers if answer == "unknown"))
