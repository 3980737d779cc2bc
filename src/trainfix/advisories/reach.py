"""Whether a run reaches an error, judged from its config files by the advisory's triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainfix.environment.runconfig import UNKNOWN, RunConfig

if TYPE_CHECKING:
    from trainfix.advisories import Advisory, Trigger

Reachable = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Reach:
    """Whether the error is reached, and the settings that decide it, each with the file that it stands in."""

    reachable: Reachable
    because: tuple[str, ...]


def reach(advisory: Advisory, config: RunConfig | None) -> Reach:
    """Whether the run described by `config` meets every trigger; one that it certainly misses is enough for no."""
    if not advisory.triggers:
        return Reach("yes", ("every run reaches it",))
    if config is None:
        return Reach("unknown", (f"no config was given, and it depends on {_needs(advisory.triggers)}",))
    answers = [_meets(trigger, config) for trigger in advisory.triggers]
    missed = tuple(because for answer, because in answers if answer == "no")
    if missed:
        return Reach("no", missed)
    met = all(answer == "yes" for answer, _ in answers)
    return Reach("yes" if met else "unknown", tuple(because for _, because in answers))


def reach_any(advisory: Advisory, configs: Sequence[RunConfig]) -> Reach:
    """The answer over all configs: yes if one reaches it, else unknown if one may; with the reasons of those."""
    found = [reach(advisory, config) for config in configs] or [reach(advisory, None)]
    kinds: tuple[Reachable, ...] = ("yes", "unknown", "no")
    answer = next(kind for kind in kinds if any(one.reachable == kind for one in found))
    because = (reason for one in found if one.reachable == answer for reason in one.because)
    return Reach(answer, tuple(dict.fromkeys(because)))


def condition(trigger: Trigger) -> str:
    """The trigger in words, e.g. ``zero_optimization.stage = 2``."""
    if trigger.key is None:
        return trigger.when or ""
    if trigger.at_least is not None:
        return f"{trigger.key} >= {trigger.at_least:g}"
    return f"{trigger.key} = {' or '.join(map(str, trigger.equals))}"


def _needs(triggers: Sequence[Trigger]) -> str:
    return ", ".join(condition(trigger) for trigger in triggers)


def _meets(trigger: Trigger, config: RunConfig) -> tuple[Reachable, str]:
    if trigger.key is None:
        return "unknown", f"{trigger.when}: no config file shows this"
    setting = config.setting(trigger.key)
    if setting.value is UNKNOWN:
        return "unknown", setting.because
    if trigger.at_least is None:
        met = setting.value in trigger.equals
    elif isinstance(setting.value, (int, float)):
        met = setting.value >= trigger.at_least
    else:
        return "unknown", f"{setting.because}: not a number"
    return ("yes", setting.because) if met else ("no", f"{setting.because}; the error needs {condition(trigger)}")
