"""What an audited window costs, counted: memory, and waits of the host for the device before the step."""

from __future__ import annotations

import logging
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

import trainfix
from benchmarks.ledger import Loop, peak

SMALL = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
WIDE = {"vocab_size": 64000, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}


class Counting(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def waits(work):
    """Calls that give a number of the device to Python."""
    with Counting() as counting:
        work()
    return counting.calls["aten._local_scalar_dense.default"] + counting.calls["aten.nonzero.default"]


def test_before_the_step_the_host_waits_for_nothing_more_than_without():
    loop = Loop(SMALL, 2, 32)

    def backwards():
        for ids in loop.ids:
            loop.model(input_ids=ids, labels=ids).loss.backward()

    alone = waits(backwards)
    with trainfix.ledger(loop.model, loop.optimizer):
        assert waits(backwards) == alone


def test_a_large_vocabulary_takes_less_than_64_mib():
    logging.getLogger("trainfix").addHandler(logging.NullHandler())
    loop = Loop(WIDE, 1, 128)
    loop.ids = loop.ids[:2]
    loop.window()
    assert peak(loop.audited) - peak(loop.window) < 64 * 2**20
