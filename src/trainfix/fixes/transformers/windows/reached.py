"""Which of the errors a trainer reaches, and which trainers are repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from trainfix.engine.replace import live_shape
from trainfix.fixes.transformers.recognise import own_loss, plain_model, ranks, steps, uncovered, uses_deepspeed
from trainfix.fixes.transformers.windows.counting import COUNT
from trainfix.fixes.transformers.windows.division import TRAINER, right_already, shape_of_release

# Shapes of `_inner_training_loop`.
LAST_IS_NOT_REDUCED = {"2ccfb878d2e3"}  # 4.46.2
STEPS_KNOW_NO_EPOCHS = {"de44d4ab4466", "2ccfb878d2e3", "3d891afecc80"}  # 4.46.1, 4.46.2, 4.46.3


def left_alone(trainer: Any) -> str | None:
    """Why the token weights of this trainer are left as they are, or None."""
    if getattr(getattr(plain_model(trainer), "config", None), "output_router_logits", False):
        return "a router's loss is part of the model's"
    return own_loss(trainer) or uncovered(trainer)


def _divided_twice(trainer: Any) -> str | None:
    shape, count = shape_of_release(), trainer.model_accepts_loss_kwargs or None
    if not uses_deepspeed(trainer) or not right_already(trainer, shape, count, False, own_loss(trainer)):
        return None
    return f"DeepSpeed with gradient_accumulation_steps = {steps(trainer)}"


def _by_rank(trainer: Any) -> str | None:
    if ranks(trainer) == 1 or getattr(trainer.args, "average_tokens_across_devices", False):
        return None
    return None if own_loss(trainer) else f"{ranks(trainer)} ranks, and average_tokens_across_devices is not set"


def _windowed(trainer: Any) -> str | None:
    return f"gradient_accumulation_steps = {steps(trainer)}" if steps(trainer) > 1 and not own_loss(trainer) else None


def _mean(trainer: Any) -> str | None:
    if trainer.model_accepts_loss_kwargs or trainer.label_smoother is not None or not _windowed(trainer):
        return None
    return f"{type(plain_model(trainer)).__name__} takes no {COUNT}, {_windowed(trainer)}"


def _count_lost(trainer: Any) -> str | None:
    return _windowed(trainer) if trainer.model_accepts_loss_kwargs else None


def _end_not_read(trainer: Any) -> str | None:
    rows, batches = _epoch_length(trainer)
    if not (_windowed(trainer) and 0 < rows % steps(trainer) < batches % steps(trainer)):
        return None
    return f"epochs of {rows} rows, {batches} micro-batches on a rank, and {_windowed(trainer)}"


def _across_epochs(trainer: Any) -> str | None:
    _, batches = _epoch_length(trainer)
    if not (_windowed(trainer) and batches > steps(trainer) and batches % steps(trainer)):
        return None
    return f"epochs of {batches} micro-batches, and {_windowed(trainer)}"


def _epoch_length(trainer: Any) -> tuple[int, int]:
    """The rows of an epoch and the micro-batches of a rank, 0 where there is one epoch only or it has no length."""
    args = trainer.args
    try:
        rows = len(trainer.train_dataset)
    except TypeError:
        return 0, 0
    batches = ceil(ceil(rows / args.train_batch_size) / ranks(trainer))
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / max(batches // steps(trainer), 1)
    return (rows, batches) if epochs > 1 else (0, 0)


def _unreduced(trainer: Any) -> str | None:
    if live_shape(TRAINER + "_inner_training_loop") not in LAST_IS_NOT_REDUCED:
        return None
    several = ranks(trainer) > 1 and not uses_deepspeed(trainer)
    return f"{ranks(trainer)} ranks, {_kind(trainer)}" if several else None


def _kind(trainer: Any) -> str:
    return str(trainer.accelerator.distributed_type).rpartition(".")[2]


REACHED: Mapping[str, Callable[..., str | None]] = {
    "TF-0402": _by_rank,
    "TF-0403": _divided_twice,
    "TF-0406": _mean,
    "TF-0407": _count_lost,
    "TF-0408": _mean,
    "TF-0409": _end_not_read,
    "TF-0410": _across_epochs,
    "TF-0411": _unreduced,
}


def repairs(trainer: Any) -> bool:
    """Whether the fix looks after this trainer."""
    if _unreduced(trainer):
        return _kind(trainer).startswith("MULTI_")  # DDP
    if _divided_twice(trainer):
        return True
    return left_alone(trainer) is None and (steps(trainer) > 1 or ranks(trainer) > 1)


def own(trainer: Any) -> str | None:
    """Whose loss it is, if not one that we know: what is wrong for every loss is repaired all the same."""
    return None if _divided_twice(trainer) or _unreduced(trainer) else own_loss(trainer)
