"""A Trainer's training data loader that looks one window ahead, so that a window's tokens are known before its first
backward. For the releases whose Trainer asks the loader for one micro-batch at a time (before 4.46).

The Trainer's own loop alone looks ahead; whoever else iterates over the loader gets it as it is. Micro-batches that do
not fill a window when the data ends are handed out at the beginning of the next epoch, before its own: no optimizer
step lies between, so they meet the same weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

from wrapt import ObjectProxy

from trainfix.engine.contract import window_ended
from trainfix.fixes import token_weighting
from trainfix.fixes.token_weighting import LookAhead
from trainfix.fixes.transformers import recognise

_EVERY = "sync_each_batch"  # accelerate's option, from 0.28 on: gradients are reduced at every micro-batch

_Proxy: Any = ObjectProxy  # its stub is generic, itself it is not before wrapt 2

_Batch = tuple[Any, Any]
"""A micro-batch, and its trained tokens: None without labels, a tensor where the labels are on a device."""


class Training:
    """One training under way.

    `own`: the trained tokens of the micro-batch that was handed out last. `begins`: whether it is the first of its
    window. `repaired`: whether that window's losses are weighted; decided when it begins.
    """

    def __init__(self, trainer: Any, loop: CodeType) -> None:
        self.trainer, self.loop = trainer, loop
        self.own: Any = None
        self.begins = self.in_window = self.repaired = False
        self._windows: _Windows | None = None
        self._epoch, self._more_epochs = 0, 0
        divisor = trainer.accelerator.gradient_accumulation_steps
        backend = token_weighting.BACKENDS["deepspeed" if recognise.uses_deepspeed(trainer) else "accelerate"]
        self._factor = backend.factor(steps=divisor, ranks=recognise.ranks(trainer))

    @contextmanager
    def loaders(self) -> Iterator[None]:
        """Let the trainer get loaders that look ahead, its own or a subclass's."""
        trainer, state = self.trainer, self.trainer.accelerator.gradient_state
        make, before = trainer.get_train_dataloader, vars(trainer).get("get_train_dataloader")
        asked = state.plugin_kwargs.get(_EVERY)

        def looking_ahead() -> AheadLoader:
            loader = make()
            if self._cut_short(_length(loader)):
                # The Trainer says that such a window ends after its last backward, where DDP has not reduced anything.
                state.plugin_kwargs[_EVERY] = True
            return AheadLoader(loader, self)

        trainer.get_train_dataloader = looking_ahead
        try:
            yield
        finally:
            state.plugin_kwargs.pop(_EVERY, None)
            if asked is not None:
                state.plugin_kwargs[_EVERY] = asked
            del trainer.get_train_dataloader
            if before is not None:
                trainer.get_train_dataloader = before

    def weigh(self, result: Any) -> Any:
        """What `compute_loss` returned, the loss being the micro-batch's part of the mean over the window's tokens."""
        if isinstance(result, tuple):
            return (self.weigh(result[0]), *result[1:])
        from torch import nan_to_num, where, zeros_like

        assert self._windows is not None
        if isinstance(self.own, int) and not self.own:
            return nan_to_num(result) * 0  # the mean over nothing is nan, and its gradient zero
        part = result * (self.own * self._factor / self._windows.total.clamp(min=1))
        return part if isinstance(self.own, int) else where(self.own > 0, part, zeros_like(part))

    def smoothable(self, inputs: Any) -> Any:
        """The same, with one label if there is none: even times zero the smoother's gradient would be nan."""
        if self.trainer.label_smoother is None or (isinstance(self.own, int) and self.own):
            return inputs
        from torch import as_tensor

        labels = inputs["labels"].clone()
        labels[:1, 1:2].masked_fill_(as_tensor(self.own == 0, device=labels.device), 0)
        return {**inputs, "labels": labels}

    def set_epoch(self, set_epoch: Any, epoch: int) -> None:
        self._epoch = epoch
        set_epoch(epoch + self._more_epochs)

    def hand_out(self, loader: Any, length: int | None) -> Iterator[Any]:
        """The micro-batches of one epoch of the Trainer. `length`: those of a whole epoch, if it is known."""
        if self._windows is None:
            self._windows = _windows(self.trainer)
        last = length if self._cut_short(length) else None
        with _left_on_the_host(loader) as send:
            while True:
                handed, held = False, self._windows.held
                for batch, own in self._windows.epoch(_counted(loader), last):
                    self.own, handed = own, True
                    self.begins, self.in_window = not self.in_window, True
                    yield send(batch)
                    if not self._windows.held:
                        self.end_window()
                if handed or self._windows.held == held:
                    return
                self._next_epoch(loader)  # this one did not fill a window, and the Trainer ends at an empty epoch

    def _cut_short(self, length: int | None) -> bool:
        """Whether the Trainer ends a window with every epoch. DeepSpeed's engine goes by its own count."""
        if length is None or recognise.uses_deepspeed(self.trainer):
            return False
        return length <= recognise.steps(self.trainer)

    def _next_epoch(self, loader: Any) -> None:
        self._more_epochs += 1
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self._epoch + self._more_epochs)

    def end_window(self) -> None:
        self.in_window = self.begins = self.repaired = False
        window_ended(self.trainer)


class AheadLoader(_Proxy):  # type: ignore[misc]
    """A training data loader that looks ahead for one training. `whole` is the loader of which it is the rest."""

    def __init__(self, loader: Any, training: Training, whole: Any = None) -> None:
        super().__init__(loader)
        self._self_training = training
        self._self_whole = loader if whole is None else whole

    def __iter__(self) -> Iterator[Any]:
        if sys._getframe(1).f_code is not self._self_training.loop:
            return iter(self.__wrapped__)
        return self._self_training.hand_out(self.__wrapped__, _length(self._self_whole))

    @property
    def set_epoch(self) -> Any:
        set_epoch = self.__wrapped__.set_epoch  # some have none
        return lambda epoch: self._self_training.set_epoch(set_epoch, epoch)

    def rest(self, rest: Any) -> AheadLoader:
        return AheadLoader(rest, self._self_training, self._self_whole)


class _Windows(LookAhead):
    """Windows that end where the Trainer, or DeepSpeed's engine, ends them; they span epochs."""

    @property
    def held(self) -> int:
        return len(self._held)

    def epoch(self, source: Iterable[_Batch], last: int | None) -> Iterator[_Batch]:
        """The micro-batches of one turn of `source`. With the `last`-th a window ends, whatever the count of all; the
        Trainer keeps that count, so the next window ends where it would have ended anyway."""
        for number, batch in enumerate(source, 1):
            self._held.append(batch)
            self._missing -= 1
            if not self._missing or number == last:
                missing = self._missing or self.length
                yield from self._window()
                self._missing = missing


def _windows(trainer: Any) -> _Windows:
    steps, device, done = recognise.steps(trainer), trainer.args.device, 0
    if recognise.uses_deepspeed(trainer):  # its engine may be in mid-window after an earlier training
        engine = trainer.deepspeed
        by_count = engine._is_gradient_accumulation_boundary is None
        done = (engine.micro_steps if by_count else trainer.accelerator.step) % steps

    def tokens(batch: _Batch) -> Any:
        return 0 if batch[1] is None else batch[1]

    def add_up(tokens: Any) -> Any:
        return token_weighting.over_ranks(tokens, device=device)

    return _Windows(steps, tokens, add_up, first=steps - done)


def _counted(loader: Iterable[Any]) -> Iterator[_Batch]:
    """Every micro-batch with its trained tokens. A dispatcher's are on the device already; nobody waits for those."""
    for batch in loader:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if labels is None:
            yield batch, None
        elif labels.device.type == "cpu":
            yield batch, int(token_weighting.trained(labels))
        else:
            yield batch, token_weighting.trained(labels)


@contextmanager
def _left_on_the_host(loader: Any) -> Iterator[Callable[[Any], Any]]:
    """Let accelerate's loader leave its micro-batches where they are made. Yields what sends one to its device."""
    from accelerate.data_loader import DataLoaderShard  # type: ignore[import-untyped]
    from accelerate.utils import send_to_device  # type: ignore[import-untyped]

    device = loader.device if isinstance(loader, DataLoaderShard) else None
    if device is None:
        yield lambda batch: batch
        return
    options = {"non_blocking": True} if getattr(loader, "_non_blocking", False) else {}
    loader.device = None
    try:
        yield lambda batch: send_to_device(batch, device, **options)
    finally:
        loader.device = device


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # as transformers decides it
        return None
