"""transformers' own Trainer, on one rank or two, with and without DeepSpeed."""

from __future__ import annotations

import torch

from tests.ledger.mutations.loops import data
from tests.support import trainer_runs

STEPS = 3


def _tokenizer():
    """Of the tiny model's words; 0 is padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1} | {f"word{number}": number for number in range(2, 64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", unk_token="<unk>"
    )


def train(*, ranks=1, model=None, collator="padded", lora=False, deepspeed=None, **arguments):
    import transformers

    from trainfix.proofs import token_experiment as tiny

    network = data.model(**(model or {}))
    if lora:
        from peft import LoraConfig, get_peft_model

        network = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        network.enable_input_require_grads()
    count = data.ROWS * sum(data.WINDOWS) * ranks
    asked = trainer_runs.Configuration(
        steps=STEPS, rows=count, rows_per_batch=data.ROWS, deepspeed=deepspeed, arguments=arguments
    )
    collate = {
        "padded": lambda: tiny.collate,
        "left": lambda: data.collate_left,
        "flattened": lambda: transformers.DataCollatorWithFlattening(return_tensors="pt"),
        "language modeling": lambda: transformers.DataCollatorForLanguageModeling(_tokenizer(), mlm=False),
    }[collator]()
    rows = data.rows(count)
    if collator in ("flattened", "language modeling"):  # they make the labels
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    trainer = type("Trainer", (transformers.Trainer,), {"_get_train_sampler": trainer_runs._in_order})(
        model=network,
        args=trainer_runs.training_arguments(asked),
        train_dataset=trainer_runs.Rows(rows),
        data_collator=collate,
    )
    torch.manual_seed(1)
    trainer.train()
