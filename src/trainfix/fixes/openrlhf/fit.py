"""One run of SFTTrainer.fit in which every trained token counts the same: what the repairs of its loss share.

Whether a trainer is looked after is decided when `fit` begins, and holds until it ends. While it runs

- its loader hands out micro-batches by whole windows of the engine, kept from epoch to epoch as 0.11.2 does it; the
  run's last one, if it is not complete, is never handed out, as the engine would never apply it;
- its loss is, for the optimizer, (sum of a micro-batch's losses) * steps * ranks / (tokens of the window on all ranks),
  which DeepSpeed divides by steps and averages over the ranks. The value of that loss stays the micro-batch's own mean;
- its log is told the loss of the whole window.

The tokens are counted over all ranks, also those that share a micro-batch by ring attention or tensor parallelism:
each micro-batch is counted as often as its gradient enters the average, so both factors are too large by the same one.
A window that the engine began earlier is left as it began. An evaluation between two windows has the loss it had.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

from trainfix.engine.contract import Function, Guard, Target
from trainfix.fixes.token_weighting import BACKENDS, LookAhead, over_ranks

TRAINER = "openrlhf.trainer.sft_trainer:SFTTrainer."
LOSS = "openrlhf.models.loss:SFTLoss."
STRATEGY = "openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy."

# What every repaired release has; the comment is the first release with that shape.
STRATEGY_SHAPES = (
    Target(STRATEGY + "backward", frozenset({"415e63dc811d", "f4f74f8447f0"})),  # 0.5.2, 0.10.2
    Target(STRATEGY + "optimizer_step", frozenset({"3b41c81f81cd", "447dc2064a23"})),  # 0.5.2, 0.10.2
    Target(STRATEGY + "all_reduce", frozenset({"0d31c0c89459"})),  # 0.5.2
)

LIMITS = "ring attention and tensor parallelism were read, not run; an epoch's last micro-batches run in the next one"

Reached = Callable[[Any], "str | None"]


def engine_of(trainer: Any) -> Any:
    """The DeepSpeed engine, as the trainer's strategy finds it."""
    actor = sys.modules["openrlhf.models"].Actor
    return trainer.model.model if isinstance(trainer.model, actor) else trainer.model


def data_parallel(strategy: Any) -> int:
    """How many ranks have micro-batches of their own."""
    shared = getattr(strategy, "ring_attn_size", 1) * getattr(strategy, "ds_tensor_parallel_size", 1)
    return int(strategy.world_size) // int(shared)


def own(trainer: Any) -> str | None:
    """What of the user's own stands in place of OpenRLHF's loss, loop, strategy or DeepSpeed's engine."""
    loss = trainer.loss_fn
    if not is_loss(loss, "SFTLoss") or not loss.token_level_loss:
        return f"own loss: {_name(type(loss))}"
    loop, theirs = type(trainer).fit, sys.modules["openrlhf.trainer.sft_trainer"].SFTTrainer.fit
    if loop is not theirs and "fit" not in getattr(getattr(loop, "__code__", None), "co_names", ("fit",)):
        return f"own loop: {_name(loop)}"  # it does not go on to ours
    strategy = type(trainer.strategy)
    if not all(_is_theirs(getattr(strategy, name)) for name in ("backward", "optimizer_step", "all_reduce")):
        return f"own strategy: {_name(strategy)}"
    return own_engine(trainer)


def is_loss(loss: Any, name: str) -> bool:
    """Whether it is OpenRLHF's loss of this name, with OpenRLHF's own `forward`."""
    forward = getattr(type(loss), "forward", None)
    theirs = getattr(forward, "__module__", "") == LOSS.partition(":")[0]
    return theirs and type(loss).__name__ == name and "forward" not in vars(loss)


def own_engine(trainer: Any) -> str | None:
    """What stands in place of DeepSpeed's engine."""
    engine = engine_of(trainer)
    known = hasattr(engine, "gradient_accumulation_steps") and hasattr(engine, "micro_steps")
    return None if known else f"own engine: {_name(type(engine))}"


def _is_theirs(function: Any) -> bool:
    return getattr(function, "__module__", "") == STRATEGY.partition(":")[0]


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def guards(advisory: str, reached: Reached) -> tuple[Guard, ...]:
    """The trainer's constructor."""
    return (Guard(TRAINER + "__init__", {advisory: reached}),)


def weighted(fit: Function, repairs: Callable[[Any], bool]) -> Function:
    """`fit` with the repair, for trainers that it `repairs`."""

    @wraps(fit)
    def fit_with_equal_tokens(self: Any, *args: Any, **named: Any) -> Any:
        if not repairs(self):
            return fit(self, *args, **named)
        with _equal_tokens(self):
            return fit(self, *args, **named)

    return fit_with_equal_tokens


@contextmanager
def _equal_tokens(trainer: Any) -> Iterator[None]:
    """The trainer's loader, loss and log are ours, and in the end what they were."""
    account = _Account(trainer)
    with ExitStack() as undo:
        undo.enter_context(_in_place(trainer, "train_dataloader", _iterated_by(trainer.train_dataloader, account)))
        undo.enter_context(_in_place(trainer.loss_fn, "forward", account.loss))
        undo.enter_context(_in_place(trainer, "save_logs_and_checkpoints", account.log))
        yield


@contextmanager
def _in_place(instance: Any, name: str, value: object) -> Iterator[None]:
    """`value` as this object's own attribute; in the end what was there, or nothing where nothing was."""
    attributes = vars(instance)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        if attributes.get(name) is value:
            del attributes[name]
            attributes.update(before)


def _iterated_by(loader: Any, account: _Account) -> Any:
    """`loader` in every respect (its sampler, its length), but iterated by `account`."""
    import wrapt

    proxy: Any = wrapt.ObjectProxy  # its stub is generic, itself it is not

    class Windows(proxy):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Any]:
            return account.hand_out(self.__wrapped__)

    return Windows(loader)


class _Account:
    """The micro-batches of one run of `fit`: which window each is part of, and the losses of the last whole window."""

    def __init__(self, trainer: Any) -> None:
        import torch

        engine = engine_of(trainer)
        steps = engine.gradient_accumulation_steps()
        begun = engine.micro_steps % steps
        self.steps, self.of_earlier_window = steps, steps - begun if begun else 0
        add_up = partial(over_ranks, device=engine.device, dtype=torch.float64)
        self.look = LookAhead(steps, _tokens, add_up, first=self.of_earlier_window or None)
        self.factor = BACKENDS["deepspeed"].factor(steps=steps, ranks=trainer.strategy.world_size)
        self.strategy = trainer.strategy
        self.loss_of_release = trainer.loss_fn.forward
        self.log_of_release = trainer.save_logs_and_checkpoints
        self.totals: deque[Any] = deque()  # of the micro-batches that were handed out and have no loss yet
        self.parts: list[Any] = []  # of the mean of the window that is under way
        self.whole: list[Any] = []

    def hand_out(self, source: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of one epoch, and the tokens of each one's window in `totals`."""
        for batch in self.look(source):
            early = self.of_earlier_window > 0
            self.of_earlier_window -= early
            self.totals.append(None if early else self.look.total)
            yield batch

    def loss(self, per_token_logps: Any, loss_mask: Any, **given: Any) -> Any:
        """A micro-batch's own mean, to read, with the gradient of its part in the mean of the window's tokens."""
        import torch

        if not (self.totals and torch.is_grad_enabled()):
            return self.loss_of_release(per_token_logps, loss_mask, **given)
        total = self.totals.popleft()
        if total is None:
            return self.loss_of_release(per_token_logps, loss_mask, **given)
        summed = -(per_token_logps * loss_mask).sum()
        part = summed * (self.factor / total.where(total > 0, 1)).to(summed.dtype)
        self.parts.append(part.detach())
        if len(self.parts) == self.steps:
            self.whole, self.parts = self.parts, []
        tokens = loss_mask.sum()
        return (summed / tokens.where(tokens > 0, 1)).detach() + (part - part.detach())

    def log(self, args: Any, global_step: int, step_bar: Any, logs_dict: dict[str, Any], *rest: Any) -> Any:
        """The release's log, told the loss of the last whole window's tokens on all ranks."""
        import torch

        if self.whole:
            loss = self.strategy.all_reduce(torch.stack(self.whole).mean()).item()
            logs_dict = {**logs_dict, "gpt_loss": loss, "loss_mean": loss}
            step_bar.set_postfix(logs_dict)
        return self.log_of_release(args, global_step, step_bar, logs_dict, *rest)


def _tokens(batch: Any) -> float:
    """The trained tokens of (inputs, attention masks, loss masks), or their weights, as the loss adds them up."""
    return float(batch[2].squeeze(1)[:, :-1].double().sum())
