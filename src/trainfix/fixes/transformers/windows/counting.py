"""The tokens of a window, counted before its first backward."""

from __future__ import annotations

from typing import Any

from trainfix.fixes.token_weighting import over_ranks, trained
from trainfix.fixes.transformers.recognise import ranks
from trainfix.fixes.transformers.windows.division import COUNT_IS_LOST

COUNT = "num_items_in_batch"


def weighed(
    trainer: Any, batches: list[Any], count: Any, advisories: frozenset[str], shape: str | None, *, recount: bool
) -> tuple[list[Any], Any, list[tuple[Any, Any] | None]]:
    """The window's micro-batches, the count that its model divides by, and the weights of the means where it does not.

    Every rank comes here for every window. Nothing here waits for the device.
    """
    weights: list[tuple[Any, Any] | None] = [None] * len(batches)
    takes = bool(trainer.model_accepts_loss_kwargs)
    adds_up = bool(getattr(trainer.args, "average_tokens_across_devices", False))
    means = not takes and trainer.label_smoother is None and bool(advisories & {"TF-0406", "TF-0408"})
    by_rank = ranks(trainer) > 1 and "TF-0402" in advisories and not adds_up
    if not (means or by_rank or recount or (shape in COUNT_IS_LOST and takes)):
        return batches, count, weights
    if any("labels" not in batch for batch in batches):
        return batches, count, weights
    tokens = [trained(batch["labels"]) for batch in batches]
    if means:
        total = _over_ranks(trainer, tokens)
        return batches, count, [(one, one * ranks(trainer) / total.clamp(min=1)) for one in tokens]
    if by_rank:
        count = _over_ranks(trainer, tokens).clamp(min=1) / ranks(trainer)
    elif recount and takes:
        count = (_over_ranks(trainer, tokens) if adds_up else sum(tokens)).clamp(min=1) if tokens else None
    if "TF-0407" in advisories and shape in COUNT_IS_LOST and takes:
        batches = [{**batch, COUNT: count} for batch in batches]
    return batches, count, weights


def _over_ranks(trainer: Any, tokens: list[Any]) -> Any:
    """The sum over the window and over all ranks, a 0-dim tensor on the trainer's device."""
    return over_ranks(sum(tokens), device=trainer.accelerator.device)
