"""What a configuration may do to a trainer before training, by name: `prepare` of tests.support.trainer_runs."""

from __future__ import annotations

from typing import Any


def takes_no_count(trainer: Any, configuration: Any) -> None:
    """Let the trainer hold the model for one that takes no number of tokens, as LLaMA-Factory does."""
    trainer.model_accepts_loss_kwargs = False
