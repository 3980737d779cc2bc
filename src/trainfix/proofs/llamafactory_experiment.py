"""What the proofs of LLaMA-Factory share: its own trainer for supervised fine-tuning, on the tiny model.

Runs only in a child interpreter (see `trainfix.proofs.prove`).
"""

from __future__ import annotations

import importlib
import os
import tempfile
from typing import Any

from . import token_experiment as tokens

STEPS = 4


class _Processor:
    """All that the trainer does with a checkpoint's processor is to save it with the model."""

    def save_pretrained(self, folder: str) -> None:
        pass


def train(
    *, processor: bool = False, losses: tokens.TokenLosses = tokens.cross_entropy, **finetuning: Any
) -> tokens.Watch:
    """Train for four windows of four micro-batches and watch it. `finetuning`: more FinetuningArguments."""
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    importlib.import_module("llamafactory.train.tuner")  # all of its trainers, as its own command imports them
    settings: Any = importlib.import_module("llamafactory.hparams")
    trainers: Any = importlib.import_module("llamafactory.train.sft.trainer")
    transformers: Any = importlib.import_module("transformers")
    taken = getattr(settings, "TrainingArguments", transformers.Seq2SeqTrainingArguments)  # its own since 0.9.2

    model = tokens.tiny_llama()
    watch = tokens.Watch(model, losses=losses)
    rows = tokens.answers(4 * STEPS)
    watch.learn(rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = taken(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=STEPS,
            num_train_epochs=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
        )
        trainer = trainers.CustomSeq2SeqTrainer(
            model=model,
            args=arguments,
            finetuning_args=settings.FinetuningArguments(stage="sft", **finetuning),
            processor=_Processor() if processor else None,
            tokenizer=None,
            train_dataset=tokens.Rows(rows),
            data_collator=tokens.collate,
            **({"ref_model": tokens.tiny_llama()} if finetuning.get("use_asft_loss") else {}),
        )
        watch.attach(trainer.create_optimizer())
        trainer.train()
    return watch
