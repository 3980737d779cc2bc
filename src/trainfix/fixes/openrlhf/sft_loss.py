"""SFTTrainer weights every micro-batch of every rank the same, whatever its number of tokens. Repairs TF-0101.

Up to 0.10.2 `SFTLoss` is a micro-batch's mean over its own trained tokens (`masked_mean`); DeepSpeed adds these up,
divides by the accumulation steps and averages over the ranks: a mean of means, in which a token of a short answer
counts more than one of a long answer. A micro-batch without trained tokens makes the loss NaN. The loss was always
so; it has this form since OpenRLHF#923 (0.7.0), for the releases before see early_sft_loss.py. 0.10.3 divides by the
tokens of all ranks, OpenRLHF#1249 (0.10.4) by those of the whole window, and OpenRLHF#1337 (0.11.2) lets the windows
go on from epoch to epoch.

What we do instead: `fit` runs with the arithmetic of 0.11.2; see fit.py.

Delete this file when no supported framework or user needs an OpenRLHF older than 0.10.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainfix.engine.contract import Fix, Function, Target
from trainfix.fixes.openrlhf import fit

_FIT = fit.TRAINER + "fit"


def reached(trainer: Any) -> str | None:
    """With one micro-batch in all there is only one mean."""
    steps = fit.engine_of(trainer).gradient_accumulation_steps()
    ranks = fit.data_parallel(trainer.strategy)
    parts = [f"{steps} accumulated micro-batches"] * (steps > 1) + [f"{ranks} data-parallel ranks"] * (ranks > 1)
    return f"the loss is averaged over {' and '.join(parts)}" if parts else None


def _repairs(trainer: Any) -> bool:
    return fit.own(trainer) is None and reached(trainer) is not None


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement."""
    return {_FIT: fit.weighted(originals[_FIT], _repairs)}


# Shapes of the releases 0.7.0 to 0.10.2; the comment is the first release that has each.
FIX = Fix(
    name="openrlhf.sft_loss",
    package="openrlhf",
    advisories=("TF-0101",),
    requires={"openrlhf": ">=0.7.0"},
    targets=(
        Target(_FIT, frozenset({"16d126a62376", "ebc27c487bca", "343a587a309f", "a3619bef3d37"})),
        # 0.7.0, 0.9.6, 0.9.7, 0.10.2
    ),
    relies_on=(
        Target(fit.LOSS + "forward", frozenset({"4d03d3f26c1c"})),  # 0.7.0
        *fit.STRATEGY_SHAPES,
    ),
    guards=fit.guards("TF-0101", reached),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    own=fit.own,
    limits=fit.LIMITS,
)
