"""The replacements: a window is decided upon where it is read, and each of its micro-batches is trained by that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from trainfix.engine.contract import Function, window_ended
from trainfix.engine.replace import live_shape
from trainfix.fixes.transformers.recognise import steps, uses_deepspeed
from trainfix.fixes.transformers.windows.counting import COUNT, weighed
from trainfix.fixes.transformers.windows.division import (
    COUNT_IS_LOST,
    TRAINER,
    Sent,
    backward_undivided,
    divisor,
    right_already,
)
from trainfix.fixes.transformers.windows.reached import LAST_IS_NOT_REDUCED, STEPS_KNOW_NO_EPOCHS
from trainfix.fixes.transformers.windows.state import Window, epoch_of, epochs, go_on, windows


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once transformers.trainer is imported."""
    windows.clear()  # after a revert transformers' code may have gone on with them
    epochs.clear()
    read = originals[TRAINER + "get_batch_samples"]
    train = originals[TRAINER + "training_step"]
    shape = live_shape(TRAINER + "training_step")
    loop = live_shape(TRAINER + "_inner_training_loop")
    across = "TF-0410" in advisories and loop in STEPS_KNOW_NO_EPOCHS
    reduces_last = "TF-0411" in advisories and loop in LAST_IS_NOT_REDUCED

    @wraps(read)
    def read_window(self: Any, epoch_iterator: Any, num_batches: int, *rest: Any) -> Any:
        epoch = epoch_of(self, epoch_iterator)
        if epoch.own is not None:
            batches, count = read(self, epoch_iterator, num_batches, *rest)
            windows[self] = Window(epoch.own, [None] * len(batches), len(batches))
            return batches, count
        wanted = steps(self) if "TF-0409" in advisories or across else num_batches
        batches, count = read(self, epoch_iterator, wanted, *rest)
        if across:
            batches = go_on(epoch, batches, steps(self))
        batches, count, weights = weighed(self, batches, count, advisories, shape, recount=across)
        windows[self] = Window(None, weights, len(batches))
        return batches, count

    @wraps(train)
    def train_weighed(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        window = windows.get(self)
        if window is None or not window.left:  # a window that began without us
            return train(self, model, inputs, num_items_in_batch)
        with _reduced(model) if reduces_last and window.left == 1 else nullcontext():
            return train_in(window, self, model, inputs, num_items_in_batch)

    def train_in(window: Window, self: Any, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        weight = window.weights[-window.left]
        handed_on = shape in COUNT_IS_LOST and COUNT in inputs
        right = "TF-0403" in advisories and right_already(self, shape, num_items_in_batch, handed_on, window.own)
        try:
            if weight is None and not (uses_deepspeed(self) and (right or handed_on)):
                return train(self, model, inputs, num_items_in_batch)
            sent = Sent(weight, divisor(self, shape, num_items_in_batch))
            with backward_undivided(self, sent):
                returned = train(self, model, inputs, num_items_in_batch)
            return returned if weight is None else sent.loss
        finally:
            window.left -= 1
            if not window.left:
                window_ended(self)

    return {TRAINER + "get_batch_samples": read_window, TRAINER + "training_step": train_weighed}


@contextmanager
def _reduced(model: Any) -> Iterator[None]:
    """Let DDP reduce what `backward` adds meanwhile, although it was asked not to."""
    before = getattr(model, "require_backward_grad_sync", None)
    if before is None:  # one process
        yield
        return
    model.require_backward_grad_sync = True
    try:
        yield
    finally:
        model.require_backward_grad_sync = before
