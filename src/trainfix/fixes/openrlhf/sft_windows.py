"""SFTTrainer begins a new window with every epoch, and the engine does not. Repairs TF-0103.

OpenRLHF#1249 (0.10.4) divides the loss by the tokens of a window that it takes from the loader, epoch by epoch. Where
the micro-batches of an epoch are no multiple of the accumulation steps, DeepSpeed's window goes on into the next epoch:
from there on every update adds up parts of two windows, each divided by its own number of tokens, and so weighs tokens
differently. OpenRLHF#1337 (0.11.2) lets its windows go on as the engine's do.

What we do instead: `fit` runs with the arithmetic of 0.11.2; see fit.py.

Delete this file when no supported framework or user needs an OpenRLHF older than 0.11.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainfix.engine.contract import Fix, Function, Target
from trainfix.fixes.openrlhf import fit

_FIT = fit.TRAINER + "fit"


def reached(trainer: Any) -> str | None:
    """Within the first epoch, and where windows end with the epochs, the two agree."""
    steps = fit.engine_of(trainer).gradient_accumulation_steps()
    try:
        batches = len(trainer.train_dataloader)
    except TypeError:
        return None  # nor could `fit` run
    if trainer.epochs < 2 or batches % steps == 0:
        return None
    return f"{trainer.epochs} epochs of {batches} micro-batches in windows of {steps}"


def _repairs(trainer: Any) -> bool:
    return fit.own(trainer) is None and reached(trainer) is not None


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement."""
    return {_FIT: fit.weighted(originals[_FIT], _repairs)}


# Shapes of the releases 0.10.4 to 0.11.1.
FIX = Fix(
    name="openrlhf.sft_windows",
    package="openrlhf",
    advisories=("TF-0103",),
    requires={"openrlhf": ">=0.10.4"},
    targets=(Target(_FIT, frozenset({"a26f3b495d1f"})),),
    relies_on=(
        Target(fit.LOSS + "forward", frozenset({"ce2cd741512d"})),
        *fit.STRATEGY_SHAPES,
    ),
    guards=fit.guards("TF-0103", reached),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    own=fit.own,
    limits=fit.LIMITS,
)
