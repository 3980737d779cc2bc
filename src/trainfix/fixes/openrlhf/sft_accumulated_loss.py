"""SFTTrainer of 0.10.3 weights every micro-step the same, whatever its number of tokens. Repairs TF-0102.

0.10.3 divides a micro-batch's loss by the tokens that all ranks have in the same micro-step (`get_loss_batch_info`), so
the ranks are right. DeepSpeed still adds these means up over the accumulation steps and divides by their number.
OpenRLHF#1249 (0.10.4) divides by the tokens of the whole window.

What we do instead: `fit` runs with the arithmetic of 0.11.2; see fit.py.

Delete this file when no supported framework or user needs OpenRLHF 0.10.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainfix.engine.contract import Fix, Function, Target
from trainfix.fixes.openrlhf import fit

_FIT = fit.TRAINER + "fit"


def reached(trainer: Any) -> str | None:
    """Without accumulation there is only one mean."""
    steps = fit.engine_of(trainer).gradient_accumulation_steps()
    return f"the loss is averaged over {steps} accumulated micro-batches" if steps > 1 else None


def _repairs(trainer: Any) -> bool:
    return fit.own(trainer) is None and reached(trainer) is not None


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacement."""
    return {_FIT: fit.weighted(originals[_FIT], _repairs)}


# Shapes of 0.10.3.
FIX = Fix(
    name="openrlhf.sft_accumulated_loss",
    package="openrlhf",
    advisories=("TF-0102",),
    requires={"openrlhf": ">=0.10.3"},
    targets=(Target(_FIT, frozenset({"d236458aaaf3"})),),
    relies_on=(
        Target(fit.LOSS + "forward", frozenset({"ce2cd741512d"})),
        *fit.STRATEGY_SHAPES,
    ),
    guards=fit.guards("TF-0102", reached),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    own=fit.own,
    limits=fit.LIMITS,
)
