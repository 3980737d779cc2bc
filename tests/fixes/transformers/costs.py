"""A program that counts what a training does: ``python -m tests.fixes.transformers.costs FILE``.

A result holds the collective operations that Python called, by name, in the training loop, and how many micro-batches
had been made, at most, that the model had not met.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.support import trainer_runs
from tests.support.trainer_runs import Configuration, Result

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "barrier", "gather")


def perform(values: Mapping[str, Any], result: Result) -> None:
    import torch
    import transformers

    configuration = Configuration(**values)
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    model = tokens.tiny_llama()
    made, met, ahead = Counter[str](), Counter[str](), [0]

    def collate(rows: Any) -> Any:
        made["micro-batches"] += 1
        return tokens.collate(rows)

    def meet(*_: Any) -> None:
        ahead.append(made["micro-batches"] - met["micro-batches"])
        met["micro-batches"] += 1

    model.register_forward_pre_hook(meet)
    trainer = transformers.Trainer(
        model=model,
        args=trainer_runs.training_arguments(configuration),
        train_dataset=trainer_runs.Rows(tokens.answers(configuration.rows)),
        data_collator=collate,
    )
    torch.manual_seed(1)
    with _counting() as called:
        trainer.train()
    result |= {"collectives": dict(called), "most_ahead": max(ahead), "met": met["micro-batches"]}


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    """Count the calls of torch.distributed's collectives."""
    from torch import distributed

    called: Counter[str] = Counter()
    originals = {name: getattr(distributed, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            called[name] += 1
            return originals[name](*args, **named)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, counting(name))
    try:
        yield called
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


if __name__ == "__main__":
    trainer_runs.main(perform)
