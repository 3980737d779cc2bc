"""What a training reads: a program that tells it, ``python -m tests.fixes.transformers.data_loaders FILE``.

A result holds the micro-batches in the order in which the model met them (`batches`: their ids and labels), the number
of them before each optimizer step (`steps`), and what a callback sees of the data loader when an epoch begins.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support import trainer_runs
from tests.support.trainer_runs import Configuration, Result

ROWS, STEPS = 11, 4  # the last window of an epoch is short
LENGTHS = (2, 5, 0, 7, 3)  # one in five micro-batches trains nothing


def perform(values: Mapping[str, Any], result: Result) -> None:
    """`data`: "rows" (shuffled) or "stream". `resume`: the checkpoint of a first training from which a second goes on;
    the results are the second's. `arguments`: more TrainingArguments."""
    import torch
    import transformers

    result["release"] = transformers.__version__
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    rows = tokens.answers(ROWS, lengths=LENGTHS)
    saved = {"save_strategy": "steps", "save_steps": 1, "output_dir": _shared_folder()}
    arguments = {**saved, "seed": 3, **values.get("arguments", {})}
    if values["data"] == "stream":
        arguments["max_steps"] = 4
    made = trainer_runs.training_arguments(Configuration(steps=STEPS, epochs=2, arguments=arguments))
    stream = _stream(rows) if values["data"] == "stream" else trainer_runs.Rows(rows)
    checkpoints = [None]
    if "resume" in values:
        checkpoints.append(str(Path(made.output_dir, f"checkpoint-{values['resume']}")))
    for checkpoint in checkpoints:
        torch.manual_seed(0)
        model = tokens.tiny_llama()
        seen = _Seen(model)
        trainer = transformers.Trainer(
            model=model, args=made, train_dataset=stream, data_collator=tokens.collate, callbacks=[_looking(seen)]
        )
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(seen.step)
        trainer.train(resume_from_checkpoint=checkpoint)
    result |= {"batches": seen.batches, "steps": seen.steps, "loaders": seen.loaders}
    result["global_step"] = trainer.state.global_step


def _shared_folder() -> str:
    """One folder for all ranks."""
    from torch import distributed

    folder = [tempfile.mkdtemp(prefix="trainfix-")]
    if distributed.is_initialized():
        distributed.broadcast_object_list(folder)
    return folder[0]


class _Seen:
    """The micro-batches that a model is trained on."""

    def __init__(self, model: Any) -> None:
        self.batches: list[Any] = []
        self.steps: list[int] = []
        self.loaders: list[Any] = []
        model.register_forward_pre_hook(self._batch, with_kwargs=True)

    def _batch(self, model: Any, args: Any, named: Mapping[str, Any]) -> None:
        self.batches.append([named[name].tolist() for name in ("input_ids", "labels", "attention_mask")])

    def step(self, *_: Any) -> None:
        self.steps.append(len(self.batches))


def _looking(seen: _Seen) -> Any:
    from transformers import TrainerCallback

    class Looking(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
            try:
                length = len(train_dataloader)
            except TypeError:
                length = None
            sampler = getattr(train_dataloader, "sampler", None)
            has = [name for name in ("set_epoch", "dataset", "batch_sampler") if hasattr(train_dataloader, name)]
            seen.loaders.append([length, type(sampler).__name__, has, train_dataloader.batch_size])

    return Looking()


def _stream(rows: Any) -> Any:
    import torch

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Any]:
            return iter(rows)

    return Stream()


if __name__ == "__main__":
    trainer_runs.main(perform)
