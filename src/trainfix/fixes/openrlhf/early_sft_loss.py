"""Known, and not repaired: SFTTrainer of 0.5.0 to 0.6.4 averages means, a run that reaches TF-0106 is stopped.

These releases build the labels inside `fit`, from the lengths of the prompts, and average over a micro-batch in
`GPTLMLoss` (with ring attention, from 0.5.4 on, over parts of its sequence first). OpenRLHF#923 (0.7.0) replaces both
by loss masks and `SFTLoss`; what is left of the error then is TF-0101, which sft_loss.py repairs.

Delete this file when no supported framework or user needs an OpenRLHF older than 0.7.0.
"""

from __future__ import annotations

from typing import Any

from trainfix.engine.contract import Fix
from trainfix.fixes.openrlhf import fit, sft_loss


def _own(trainer: Any) -> str | None:
    if fit.is_loss(trainer.loss_fn, "GPTLMLoss"):
        return fit.own_engine(trainer)
    kind = type(trainer.loss_fn)
    return f"own loss: {kind.__module__}.{kind.__qualname__}"


FIX = Fix(
    name="openrlhf.early_sft_loss",
    package="openrlhf",
    advisories=("TF-0106",),
    requires={"openrlhf": ">=0.5.0"},
    targets=(),
    relies_on=(),
    guards=fit.guards("TF-0106", sft_loss.reached),
    build=None,
    repairs=lambda trainer: False,
    group=lambda trainer: None,
    own=_own,
    limits="trainfix stops or warns a run that reaches it and does not repair it",
)
