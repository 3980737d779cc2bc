"""Whether a run reaches an error, judged from its config files by the advisory's triggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from trainfix.advisories import Trigger
from trainfix.environment.runconfig import UNKNOWN, Origin, RunConfig, shown

if TYPE_CHECKING:
    from trainfix.advisories import Advisory

Reachable = Literal["yes", "no", "unknown"]

_NO_VERSIONS: Mapping[str, str] = MappingProxyType({})
_TRAINERS = ("transformers", "trl", "llamafactory", "axolotl")

# What a run must be for the errors of a package to exist in it at all.
RUNS_WITH: Mapping[str, Trigger] = MappingProxyType(
    {
        "deepspeed": Trigger(key="deepspeed", equals=(True,)),
        "openrlhf": Trigger(key="framework", equals=("openrlhf",)),
        "llamafactory": Trigger(key="framework", equals=("llamafactory", "llamafactory-v1")),
        "trl": Trigger(key="framework", equals=("trl",)),
        "transformers": Trigger(key="framework", equals=_TRAINERS),
        "accelerate": Trigger(key="framework", equals=("accelerate", *_TRAINERS, "llamafactory-v1")),
    }
)


@dataclass(frozen=True)
class Reach:
    """Whether the error is reached, and the settings that decide it, each with the file that it stands in.

    `by_program`: it is unknown only because the rest depends on the training program, which no config shows.
    `places`: where the deciding values stand. `program_unsaid`: the files do not say whether the run uses the package.
    """

    reachable: Reachable
    because: tuple[str, ...]
    by_program: bool = False
    places: tuple[Origin, ...] = ()
    program_unsaid: bool = False


def reach(triggers: Sequence[Trigger], config: RunConfig | None, versions: Mapping[str, str] = _NO_VERSIONS) -> Reach:
    """Whether the run described by `config` meets every trigger; one that it certainly misses is enough for no.

    `versions` are the installed ones, name -> version: some defaults depend on them.
    """
    if not triggers:
        return Reach("yes", ("every run reaches it",))
    if config is None:
        return Reach("unknown", (f"no config was given, and it depends on {', '.join(map(condition, triggers))}",))
    return _all([_meets(trigger, config, versions) for trigger in triggers])


def reach_any(advisory: Advisory, configs: Sequence[RunConfig], versions: Mapping[str, str] = _NO_VERSIONS) -> Reach:
    """The answer over all configs: yes if one reaches it, else unknown if one may; with the reasons of those."""
    found = [_reached_by(advisory, config, versions) for config in configs or (None,)]
    kinds: tuple[Reachable, ...] = ("yes", "unknown", "no")
    answer = next(kind for kind in kinds if any(one.reachable == kind for one in found))
    deciding = [one for one in found if one.reachable == answer]
    because = dict.fromkeys(reason for one in deciding for reason in one.because)
    places = dict.fromkeys(place for one in deciding for place in one.places)
    by_program, unsaid = (all(getattr(one, name) for one in deciding) for name in ("by_program", "program_unsaid"))
    return Reach(answer, tuple(because), by_program, tuple(places), unsaid)


def _reached_by(advisory: Advisory, config: RunConfig | None, versions: Mapping[str, str]) -> Reach:
    """One run. That it uses the package at all is worth a word only where it does not, or where nobody can tell."""
    runs_with = RUNS_WITH.get(advisory.package)
    own = reach(advisory.triggers, config, versions)
    if config is None or runs_with is None:
        return own
    uses = _meets(runs_with, config, versions)
    if uses.reachable == "yes" or own.reachable == "no":
        return own
    return uses if uses.reachable == "no" else replace(_all([uses, own]), program_unsaid=True)


def condition(trigger: Trigger) -> str:
    """The trigger in words, e.g. ``zero_optimization.stage = 2``."""
    if trigger.any_of:
        return " or ".join(map(condition, trigger.any_of))
    if trigger.key is None:
        return trigger.when or ""
    if trigger.at_least is not None:
        return f"{trigger.key} >= {trigger.at_least:g}"
    if trigger.above is not None:
        return f"{trigger.key} > {trigger.above:g}"
    values = ("not set" if value is None else shown(value) for value in trigger.equals)
    return f"{trigger.key} = {' or '.join(values)}"


def _all(answers: Sequence[Reach]) -> Reach:
    """Every one of them must be met."""
    missed = [one for one in answers if one.reachable == "no"]
    if missed:
        return _together("no", missed)
    unknown = [one for one in answers if one.reachable == "unknown"]
    return _together("unknown" if unknown else "yes", answers, by_program=all(one.by_program for one in unknown))


def _any(answers: Sequence[Reach]) -> Reach:
    """One of them is enough."""
    for kind in ("yes", "unknown"):
        found = [one for one in answers if one.reachable == kind]
        if found:
            return _together(found[0].reachable, found, by_program=all(one.by_program for one in found))
    return _together("no", answers)


def _together(reachable: Reachable, parts: Sequence[Reach], *, by_program: bool = False) -> Reach:
    because = tuple(reason for one in parts for reason in one.because)
    places = tuple(place for one in parts for place in one.places)
    return Reach(reachable, because, by_program and reachable == "unknown", places)


def _meets(trigger: Trigger, config: RunConfig, versions: Mapping[str, str]) -> Reach:
    if trigger.any_of:
        return _any([_meets(one, config, versions) for one in trigger.any_of])
    if trigger.key is None:
        return Reach("unknown", (f"{trigger.when}: no config file shows this",), by_program=True)
    setting = config.setting(trigger.key, versions)
    if setting.value is UNKNOWN:
        return Reach("unknown", (setting.because,), places=setting.places)
    met = _holds(trigger, setting.value)
    if met is None:
        return Reach("unknown", (f"{setting.because}: not a number",), places=setting.places)
    if met:
        return Reach("yes", (setting.because,), places=setting.places)
    return Reach("no", (f"{setting.because}; the error needs {condition(trigger)}",), places=setting.places)


def _holds(trigger: Trigger, value: object) -> bool | None:
    """Whether `value` is what the trigger asks for; None where it asks for a number and gets none."""
    if trigger.at_least is None and trigger.above is None:
        return value in trigger.equals
    if not isinstance(value, (int, float)):
        return None
    return value >= trigger.at_least if trigger.at_least is not None else value > (trigger.above or 0)
