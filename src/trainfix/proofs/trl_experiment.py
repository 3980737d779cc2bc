"""The experiment of the proofs that go through TRL's own SFTTrainer, any release since 0.9.3."""

from __future__ import annotations

import importlib
import inspect
import os
import tempfile
from typing import Any

from . import token_experiment
from .token_experiment import Watch


def train(*, steps: int, smoothing: float = 0.0) -> Watch:
    """Train the tiny model for two windows, one row per micro-batch, and watch it. `steps` is
    gradient_accumulation_steps, `smoothing` is label_smoothing_factor."""
    datasets: Any = importlib.import_module("datasets")
    trl: Any = importlib.import_module("trl")
    model = token_experiment.tiny_llama()
    watch = Watch(model, losses=token_experiment.smoothed(smoothing))
    rows = token_experiment.answers(2 * len(token_experiment.LENGTHS))
    watch.learn(rows)
    known = inspect.signature(trl.SFTConfig).parameters
    taken = inspect.signature(trl.SFTTrainer.__init__).parameters
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            "output_dir": folder,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": steps,
            "label_smoothing_factor": smoothing,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            "gradient_checkpointing": False,
            "remove_unused_columns": False,
            "dataset_text_field": "text",  # not asked for: the rows are tokens
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length" if "max_length" in known else "max_seq_length": 256,
            **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
        }
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**wanted),
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=token_experiment.collate,
            **{"processing_class" if "processing_class" in taken else "tokenizer": _tokenizer()},
        )
        watch.attach(trainer.create_optimizer())
        trainer.train()
    return watch


def _tokenizer() -> Any:
    """SFTTrainer asks for one, although nothing is left to be tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, "<unk>": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", pad_token="<pad>", padding_side="right"
    )
