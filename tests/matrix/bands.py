"""What the losses are run on: bands of releases, the ones of each that are run, and the configurations.

A band holds releases of one package that share their errors. Its runs name the release, and what is laid beside it.
The bands of transformers follow from docs/loss-shapes.json: neighbours whose functions have the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from packaging.version import Version

from tests.matrix import shapes

_DEEPSPEED = (("0", "0.15.4"), ("4.47.1", "0.16.9"))
"""From a transformers release on -> DeepSpeed. Before 4.47.1 Trainer steps inside `no_sync`, which 0.16 forbids."""

_ZERO: Mapping[str, Any] = {"deepspeed": {"stage": 1}}
_UNPREPARED = ("5.1.0",)
"""Its Trainer hands the model to accelerate under DeepSpeed only where DeepSpeed's config has a scheduler."""


@dataclass(frozen=True)
class Case:
    """One configuration of a package's runner program.

    reaches: the advisories that it reaches, where doctor says that the installed releases have them. since, until: the
    releases of the band's package that it is run on, but for those that `cannot` run it at all.
    """

    name: str
    configuration: Mapping[str, Any]
    reaches: tuple[str, ...] = ()
    ranks: int = 1
    since: str = "0"
    until: str = "9999"
    cannot: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.ranks == 2:
            object.__setattr__(self, "name", f"{self.name}, two ranks")


@dataclass(frozen=True)
class Band:
    """Releases `first` to `last` of a package, of which `runs` are run: (release, what is laid beside it)."""

    package: str
    first: str
    last: str
    runs: tuple[tuple[str, Mapping[str, str]], ...]
    cases: tuple[Case, ...]

    def holds(self, release: str) -> bool:
        return Version(self.first) <= Version(release) <= Version(self.last)


PROGRAMS: Mapping[str, str] = {
    "accelerate": "tests.support.trainer_runs",
    "llamafactory": "tests.support.llamafactory_runs",
    "openrlhf": "tests.support.openrlhf_runs",
    "transformers": "tests.support.trainer_runs",
    "trl": "tests.support.trl_runs",
}

# What no program above can reach -> the test that runs it.
RUN_ELSEWHERE: Mapping[str, str] = {"TF-0204": "tests/fixes/llamafactory/test_v1_division.py"}

_MEANS = ("TF-0401", "TF-0404", "TF-0407")
_RANKS = (*_MEANS, "TF-0402")
_EPOCHS = ("TF-0409", "TF-0410", "TF-0411")
_UNDER_DEEPSPEED = ("TF-0401", "TF-0403", "TF-0407")
_SMOOTHED: Mapping[str, Any] = {"steps": 4, "rows": 8, "arguments": {"label_smoothing_factor": 0.1}}
_NO_COUNT: Mapping[str, Any] = {"steps": 4, "rows": 6, "prepare": "tests.support.prepared:takes_no_count"}

TRANSFORMERS = (
    Case("GA8", {"steps": 8}, _MEANS),
    Case("GA1", {"steps": 1, "rows": 4}),
    Case("GA4, epochs of 6", {"steps": 4, "rows": 6, "epochs": 2}, (*_MEANS, "TF-0410")),
    Case("GA4, label smoothing", _SMOOTHED, ("TF-0401", "TF-0404", "TF-0405")),
    # The Trainer of older releases does not ask; in newer ones these models' means are averaged by design.
    Case("GA4, no token count", _NO_COUNT, ("TF-0406", "TF-0408"), since="4.46.1", until="4.54.1"),
    Case("GA4, DeepSpeed", {"steps": 4, **_ZERO}, _UNDER_DEEPSPEED, cannot=_UNPREPARED),
    Case("GA4", {"steps": 4}, (*_RANKS, "TF-0411"), ranks=2),
    Case("GA1", {"steps": 1, "rows": 4}, ("TF-0401", "TF-0402", "TF-0411"), ranks=2),
    Case("GA4, epochs of 14", {"steps": 4, "rows": 14, "epochs": 2}, (*_RANKS, *_EPOCHS), ranks=2),
    Case("GA4, label smoothing", _SMOOTHED, ("TF-0401", "TF-0404", "TF-0405", "TF-0411"), ranks=2),
    Case("GA4, DeepSpeed", {"steps": 4, **_ZERO}, (*_UNDER_DEEPSPEED, "TF-0402"), ranks=2, cannot=_UNPREPARED),
)
# In two epochs of one window and a half Trainer ends before the half one is added to the next.
_SHORT: Mapping[str, Any] = {"steps": 4, "rows": 6, "epochs": 3, **_ZERO}
_UNSTEPPED = (*_UNDER_DEEPSPEED, "TF-0501")
ACCELERATE = (
    Case("GA4, epochs of 6, DeepSpeed", _SHORT, _UNSTEPPED),
    Case("GA4, epochs of 6", {"steps": 4, "rows": 6, "epochs": 2}, (*_MEANS, "TF-0410")),
    Case("GA4, epochs of 12, DeepSpeed", {**_SHORT, "rows": 12}, (*_UNSTEPPED, "TF-0402"), ranks=2),
)

TRL = (
    Case("GA4", {"steps": 4}, (*_MEANS, "TF-0302")),
    Case("GA4, DeepSpeed", {"steps": 4, **_ZERO}, (*_UNDER_DEEPSPEED, "TF-0302")),
    Case("GA4, label smoothing", _SMOOTHED, ("TF-0302", "TF-0303", "TF-0401", "TF-0404", "TF-0405")),
    Case("GA4", {"steps": 4}, (*_RANKS, "TF-0301", "TF-0302"), ranks=2),
)

_TRL_ALONE = tuple(case for case in TRL if "deepspeed" not in case.configuration)

LLAMAFACTORY = (
    Case("text, GA4", {"steps": 4}, (*_MEANS, "TF-0205")),
    Case("processor, GA4", {"steps": 4, "checkpoint": "llava"}, (*_MEANS, "TF-0201"), since="0.9.3"),
    Case("asft, GA4", {"steps": 4, "arguments": {"use_asft_loss": True}}, ("TF-0202",), since="0.9.5"),
    Case("text, GA4", {"steps": 4}, (*_RANKS, "TF-0203", "TF-0205"), ranks=2),
)

# With a processor means are averaged on transformers 4.45 too, which nothing repairs (docs/losses.md).
_LLAMAFACTORY_TEXT = tuple(case for case in LLAMAFACTORY if "checkpoint" not in case.configuration)

_OF_MICRO_BATCHES = ("TF-0101", "TF-0102", "TF-0106")
OPENRLHF = (
    Case("GA8", {"rows": 16}, _OF_MICRO_BATCHES),
    Case("GA8, offload", {"rows": 16, "offload": True}, _OF_MICRO_BATCHES),
    Case("GA4, epochs of 6", {"steps": 4, "rows": 6, "epochs": 2}, (*_OF_MICRO_BATCHES, "TF-0103")),
    Case("GA1", {"steps": 1, "rows": 4}),
    Case("GA4", {"steps": 4, "rows": 16}, _OF_MICRO_BATCHES, ranks=2),
    Case("GA1", {"steps": 1, "rows": 4}, ("TF-0101", "TF-0106"), ranks=2),
)

Run = tuple[str, Mapping[str, str]]


def _of_transformers() -> tuple[Band, ...]:
    """Both ends of each run of releases whose functions have the same shapes are run."""
    known = shapes.load().get("transformers", {})
    bands = []
    for _, group in groupby(known, key=lambda release: tuple(known[release].items())):
        releases = list(group)
        ends = dict.fromkeys((releases[0], releases[-1]))
        runs = tuple(_on(release, deepspeed=_deepspeed(release)) for release in ends)
        bands.append(Band("transformers", releases[0], releases[-1], runs, TRANSFORMERS))
    return tuple(bands)


def _on(release: str, **beside: str) -> Run:
    return release, beside


def _with_deepspeed(release: str, transformers: str) -> Run:
    return release, {"transformers": transformers, "deepspeed": _deepspeed(transformers)}


def _deepspeed(transformers: str) -> str:
    """The release of DeepSpeed that is laid beside one of transformers."""
    return [fits for since, fits in _DEEPSPEED if Version(transformers) >= Version(since)][-1]


BANDS: tuple[Band, ...] = (
    *_of_transformers(),
    Band(
        "accelerate",
        "0.29.3",
        "1.7.0",
        (_with_deepspeed("1.0.1", "4.49.0"), _with_deepspeed("1.7.0", "4.53.3")),
        ACCELERATE,
    ),
    Band("accelerate", "1.8.0", "1.15.0", (_with_deepspeed("1.11.0", "4.53.3"),), ACCELERATE),
    Band(
        "trl",
        "0.9.3",
        "0.11.4",
        (_with_deepspeed("0.9.6", "4.45.2"), _with_deepspeed("0.11.4", "4.45.2"), _with_deepspeed("0.11.4", "4.46.3")),
        TRL,
    ),
    Band(
        "trl",
        "0.12.0",
        "0.18.2",
        (_with_deepspeed("0.12.2", "4.46.3"), _with_deepspeed("0.15.2", "4.49.0"), _with_deepspeed("0.18.2", "4.53.3")),
        TRL,
    ),
    Band("trl", "0.19.0", "1.14.2", (_on("0.24.0", transformers="4.57.6"),), _TRL_ALONE),
    Band(
        "trl",
        "1.15.0",
        "1.16.0",
        (_on("1.16.0", transformers="5.14.1"), _on("1.16.0", transformers="5.23.0")),
        _TRL_ALONE,
    ),
    Band("llamafactory", "0.8.0", "0.9.0", (_on("0.8.3"), _on("0.9.0")), LLAMAFACTORY),
    Band("llamafactory", "0.9.1", "0.9.2", (_on("0.9.1"), _on("0.9.2")), LLAMAFACTORY),
    Band("llamafactory", "0.9.3", "0.9.3", (_on("0.9.3"),), LLAMAFACTORY),
    Band("llamafactory", "0.9.3", "0.9.3", (_on("0.9.3", transformers="4.45.2"),), _LLAMAFACTORY_TEXT),
    Band("llamafactory", "0.9.4", "0.9.4", (_on("0.9.4"),), LLAMAFACTORY),
    Band("llamafactory", "0.9.5", "0.9.5", (_on("0.9.5"),), LLAMAFACTORY),
    Band("openrlhf", "0.5.0", "0.5.3", (_on("0.5.0"),), OPENRLHF),
    Band("openrlhf", "0.5.4", "0.6.4", (_on("0.5.4"), _on("0.6.4")), OPENRLHF),
    Band("openrlhf", "0.7.0", "0.10.2", tuple(map(_on, ("0.7.0", "0.9.5", "0.9.6", "0.10.2"))), OPENRLHF),
    Band("openrlhf", "0.10.3", "0.10.3", (_on("0.10.3"),), OPENRLHF),
    Band("openrlhf", "0.10.4", "0.11.1", (_on("0.10.4"), _on("0.11.1")), OPENRLHF),
    Band("openrlhf", "0.11.2", "0.11.2", (_on("0.11.2"),), OPENRLHF),
)
