"""Whether a run reaches an error, judged from its config files by the advisory's triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainfix.environment.runconfig import UNKNOWN, RunConfig, shown

if TYPE_CHECKING:
    from trainfix.advisories import Advisory, Trigger

Reachable = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Reach:
    """Whether the error is reached, and the settings that decide it, each with the file that it stands in.

    `by_program`: it is unknown only because the rest depends on the training program, which no config shows.
    """

    reachable: Reachable
    because: tuple[str, ...]
    by_program: bool = False


def reach(triggers: Sequence[Trigger], config: RunConfig | None, release: str | None = None) -> Reach:
    """Whether the run described by `config` meets every trigger; one that it certainly misses is enough for no.

    `release` is the installed one: some defaults depend on it.
    """
    if not triggers:
        return Reach("yes", ("every run reaches it",))
    if config is None:
        return Reach("unknown", (f"no config was given, and it depends on {', '.join(map(condition, triggers))}",))
    answers = [_meets(trigger, config, release) for trigger in triggers]
    missed = tuple(because for answer, because in answers if answer == "no")
    if missed:
        return Reach("no", missed)
    unknown = [trigger for trigger, (answer, _) in zip(triggers, answers, strict=True) if answer == "unknown"]
    by_program = bool(unknown) and all(trigger.key is None for trigger in unknown)
    return Reach("unknown" if unknown else "yes", tuple(because for _, because in answers), by_program)


def reach_any(advisory: Advisory, configs: Sequence[RunConfig], release: str | None = None) -> Reach:
    """The answer over all configs: yes if one reaches it, else unknown if one may; with the reasons of those."""
    found = [reach(advisory.triggers, config, release) for config in configs or (None,)]
    kinds: tuple[Reachable, ...] = ("yes", "unknown", "no")
    answer = next(kind for kind in kinds if any(one.reachable == kind for one in found))
    deciding = [one for one in found if one.reachable == answer]
    because = dict.fromkeys(reason for one in deciding for reason in one.because)
    return Reach(answer, tuple(because), all(one.by_program for one in deciding))


def condition(trigger: Trigger) -> str:
    """The trigger in words, e.g. ``zero_optimization.stage = 2``."""
    if trigger.key is None:
        return trigger.when or ""
    if trigger.at_least is not None:
        return f"{trigger.key} >= {trigger.at_least:g}"
    values = ("not set" if value is None else shown(value) for value in trigger.equals)
    return f"{trigger.key} = {' or '.join(values)}"


def _meets(trigger: Trigger, config: RunConfig, release: str | None) -> tuple[Reachable, str]:
    if trigger.key is None:
        return "unknown", f"{trigger.when}: no config file shows this"
    setting = config.setting(trigger.key, release)
    if setting.value is UNKNOWN:
        return "unknown", setting.because
    if trigger.at_least is None:
        met = setting.value in trigger.equals
    elif isinstance(setting.value, (int, float)):
        met = setting.value >= trigger.at_least
    else:
        return "unknown", f"{setting.because}: not a number"
    return ("yes", setting.because) if met else ("no", f"{setting.because}; the error needs {condition(trigger)}")
