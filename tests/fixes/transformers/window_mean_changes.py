"""What the tests of TF-0401 change about a trainer in the child: named in a configuration's `prepare` or `trainer`."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers


class OwnLoader(transformers.Trainer):  # type: ignore[misc]
    """Makes its data loader itself: torch's, without accelerate."""

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The same rows without a length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows.rows)


def stream(trainer: Any, configuration: Any) -> None:
    trainer.train_dataset = Stream(trainer.train_dataset)


def resumes(trainer: Any, configuration: Any) -> None:
    """Another trainer stops after one step, in the middle of an epoch, and saves; this one goes on from there."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # these releases saved what newer torch does not load else
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    support = importlib.import_module("tests.support.trainer_runs")
    folder = tempfile.mkdtemp()
    arguments = support.training_arguments(configuration, output_dir=folder, save_strategy="steps", save_steps=1)
    first = type(trainer)(
        model=tokens.tiny_llama(), args=arguments, train_dataset=trainer.train_dataset, data_collator=tokens.collate
    )
    first.add_callback(_Stop())
    first.train()
    train, checkpoint = trainer.train, str(Path(folder, "checkpoint-1"))
    assert Path(checkpoint).is_dir()
    trainer.train = lambda: train(resume_from_checkpoint=checkpoint)


def stream_resumes(trainer: Any, configuration: Any) -> None:
    stream(trainer, configuration)
    resumes(trainer, configuration)


class _Stop(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def looked_at_by_a_callback(trainer: Any, configuration: Any) -> None:
    """A callback on the first rank alone takes a look at the first batch of the trainer's loader, at every step."""

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                assert "labels" in next(iter(train_dataloader))

    trainer.add_callback(Look())


def counts(trainer: Any, configuration: Any) -> None:
    """At most one window of micro-batches is held, and one small sum over the ranks is taken for each."""
    rows, steps = trainer.train_dataset, configuration.steps
    seen = {"read": 0, "trained": 0, "held": 0, "sums": 0}

    class Rows(type(rows)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            seen["read"] += 1
            seen["held"] = max(seen["held"], seen["read"] - seen["trained"])
            return super().__getitem__(index)

    class Count(transformers.TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            seen["trained"] += 1

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen["trained"] += 1

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert seen["held"] <= steps + 1, seen  # accelerate reads one more to know where the data end
            repaired = "trainfix" in sys.modules and args.world_size > 1
            assert seen["sums"] == (state.global_step if repaired else 0), seen

    rows.__class__ = Rows
    trainer.add_callback(Count())
    theirs = torch.distributed.all_reduce

    def all_reduce(tensor: Any, *args: Any, **named: Any) -> Any:
        seen["sums"] += tensor.dtype == torch.int64 and tensor.dim() == 0
        return theirs(tensor, *args, **named)

    torch.distributed.all_reduce = all_reduce  # type: ignore[assignment]
    train = trainer.train

    def restoring() -> None:
        try:
            train()
        finally:
            torch.distributed.all_reduce = theirs

    trainer.train = restoring


class _At(transformers.TrainerCallback):  # type: ignore[misc]
    """Calls trainfix between the first micro-batches of the window after so many steps."""

    def __init__(self, **calls: int) -> None:
        self.calls = {steps: call for call, steps in calls.items()}

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        call = self.calls.pop(state.global_step, None)
        if call is not None:
            getattr(sys.modules["trainfix"], call)("TF-0401")


def reverts_in_the_second_window(trainer: Any, configuration: Any) -> None:
    trainer.add_callback(_At(revert=1))


def reverts_and_applies(trainer: Any, configuration: Any) -> None:
    """Reverted in the second window, and put back in the third."""
    trainer.add_callback(_At(revert=1, apply=2))


def applies_too_late(trainer: Any, configuration: Any) -> None:
    """Put in place again when the training has begun without it."""
    sys.modules["trainfix"].revert("TF-0401")
    trainer.add_callback(_At(apply=0))


def leaves_nothing_behind(trainer: Any, configuration: Any) -> None:
    """After a training the trainer is what it was."""
    before = set(vars(trainer))
    train = trainer.train

    def checked() -> None:
        train()
        new = set(vars(trainer)) - before
        assert not {"get_train_dataloader", "compute_loss", "_inner_training_loop", "_trainfix_kept"} & new, new
        from trainfix.fixes.transformers import window_mean

        assert not list(window_mean._trainings.items())

    trainer.train = checked


def knows_who_shifts(trainer: Any, configuration: Any) -> None:
    """Of the models that transformers lists as causal, those whose labels are not shifted are not taken for others."""
    from trainfix.fixes.transformers import window_mean

    small = {"vocab_size": 16, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 8}
    heads = {"encoder_ffn_dim": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    odd = transformers.BartForCausalLM(transformers.BartConfig(**small, **heads))
    assert window_mean._own_shift(odd) == "not a shifted language model: BartForCausalLM"
    for name in ("XLNetLMHeadModel", "XGLMForCausalLM", "XLMWithLMHeadModel", "MusicgenForCausalLM"):
        assert not window_mean._is_shifted(getattr(transformers, name).forward), name
    for name in ("GPT2LMHeadModel", "BloomForCausalLM", "BertLMHeadModel", "MixtralForCausalLM", "GPTNeoXForCausalLM"):
        assert window_mean._is_shifted(getattr(transformers, name).forward), name


def untouched(trainer: Any, configuration: Any) -> None:
    """What TF-0401 would wrap is there as it was written."""
    import accelerate

    for function in (accelerate.skip_first_batches, transformers.Trainer._inner_training_loop):
        assert not hasattr(function, "__wrapped__"), function
    assert not any(name.endswith("transformers.ahead") for name in sys.modules)


def is_refused_on_two_devices(trainer: Any, configuration: Any) -> None:
    """Another trainer of this one's kind, which torch's DataParallel would train on two devices."""
    import pytest

    import trainfix

    arguments = trainer.args
    arguments._n_gpu = 2
    try:
        with pytest.raises(trainfix.UnfixedBugError, match="DataParallel over 2 GPUs"):
            type(trainer)(model=trainer.model, args=arguments)
    finally:
        arguments._n_gpu = 1


def is_seq2seq(trainer: Any, configuration: Any) -> None:
    """Seq2SeqTrainer computes its loss as Trainer does; only what it makes of an evaluation is its own."""
    trainer.__class__ = type("Seq2Seq", (type(trainer), transformers.Seq2SeqTrainer), {})


def evaluates(trainer: Any, configuration: Any) -> None:
    """After every step, in the middle of an epoch: what it says is the model's own mean over the batches."""
    rows = [trainer.train_dataset[0], trainer.train_dataset[4]]
    seen = []

    class Check(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, metrics: Any, **_: Any) -> None:
            model.eval()
            with torch.no_grad():
                own = sum(float(model(**trainer.data_collator([row])).loss) for row in rows) / 2
            model.train()
            assert abs(metrics["eval_loss"] - own) < 1e-5, (metrics, own)
            seen.append(own)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert len(seen) == state.global_step

    trainer.eval_dataset = type(trainer.train_dataset)(rows)
    trainer.args.eval_strategy = transformers.trainer_utils.IntervalStrategy.STEPS
    trainer.args.per_device_eval_batch_size, trainer.state.eval_steps, trainer.args.eval_steps = 1, 1, 1
    trainer.add_callback(Check())
