"""What tests change in a trainer before it trains: the `prepare` of tests.support.openrlhf_runs. Runs in the child."""

from __future__ import annotations

import sys
from typing import Any


def begin_a_window(trainer: Any, args: Any) -> None:
    """Let OpenRLHF's own `fit` train for one epoch first, without trainfix: it leaves the engine in mid-window."""

    epochs, trainer.epochs = trainer.epochs, 1
    type(trainer).fit.__wrapped__(trainer, args, 0, 1)
    trainer.epochs = epochs


def own_loss(trainer: Any, args: Any) -> None:
    """A loss of the user's, though it computes the same."""
    theirs = sys.modules["openrlhf.models.loss"].SFTLoss
    trainer.loss_fn = type("Mine", (theirs,), {"__module__": "mine", "forward": lambda *rest: theirs.forward(*rest)})()


def half_weights(trainer: Any, args: Any) -> None:
    """Masks of 0.5: a mean with weights that are all the same is the mean."""
    rows = trainer.train_dataloader.dataset.rows
    rows[:] = [(ids, attention, mask * 0.5) for ids, attention, mask in rows]


def fail_at_the_first_log(trainer: Any, args: Any) -> None:
    def log(_: Any) -> None:
        raise RuntimeError("the log is full")

    trainer._wandb.log = log
