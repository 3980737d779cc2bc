"""Run many configurations of TRL's SFTTrainer in one child process, and say how much every token counted.

From a test: ``run(stack(trl="0.18.2", transformers="4.52.4"), [{"steps": 4}], trainfix=False, ranks=2)``.

The way is TRL's own from the text on: its tokenising, its masking of the prompts, its collator. What is trained is told
from the text alone: the answer, and the end token where TRL adds one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support import stacks, trainer_runs
from tests.support.trainer_runs import Configuration, Result

PAD, END, UNKNOWN, ANSWER, FIRST_WORD = 0, 1, 2, 3, 4  # token ids; the words are "w4", "w5", ...

BOTH: Mapping[str, Any] = {"steps": 8, "deepspeed": {"stage": 2, "offload": True}}
"""A window of eight micro-batches on one rank, as a repaired loss and a repaired optimizer see it."""

run = functools.partial(trainer_runs.run, program="tests.support.trl_runs")
"""`trainer_runs.run` with TRL's SFTTrainer: `arguments` are those of SFTConfig, `trainer` is one of TRL's classes."""

# From this TRL release on -> what it needs and the test environment lacks.
_COMPANIONS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("0.9.3", {"tyro": "0.9.35", "docstring_parser": "0.17.0", "shtab": "1.7.2", "typeguard": "4.4.4"}),
    ("0.12.0", {}),
)


def stack(trl: str, transformers: str, **packages: str) -> list[Path]:
    """`stacks.stack` with what this release of TRL needs."""
    from packaging.version import Version

    # One release brings its own tests along, under the name of ours.
    shutil.rmtree(stacks.folder("trl", trl) / "tests", ignore_errors=True)
    companions = [wants for since, wants in _COMPANIONS if Version(trl) >= Version(since)][-1]
    return stacks.stack(**{"trl": trl, "transformers": transformers, **companions, **packages})


# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.


def perform(values: Mapping[str, Any], result: Result) -> None:
    """Train, and write into the result what `trainer_runs.run_trainer` writes."""
    import torch
    import trl

    configuration = Configuration(**{"trainer": "trl:SFTTrainer", **values})
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    result["release"] = trl.__version__
    result["compute_loss"] = trl.SFTTrainer.compute_loss.__code__.co_filename  # whose it is
    model = tokens.tiny_llama(**configuration.model)
    lengths = configuration.lengths or tokens.LENGTHS
    pairs = _texts(configuration.rows, lengths)
    smoothing = configuration.arguments.get("label_smoothing_factor", 0.0)
    watch = tokens.Watch(model, losses=tokens.smoothed(smoothing))
    watch.learn(_rows(tokens, pairs))
    base: Any = trainer_runs.named(configuration.trainer)
    overrides = {} if configuration.shuffle else {"_get_train_sampler": trainer_runs._in_order}
    trainer = type(base.__name__, (base,), overrides)(model=model, **_arguments(trl, base, configuration, pairs))
    if configuration.prepare is not None:
        trainer_runs.named(configuration.prepare)(trainer, configuration)
    trainer_runs.watch_optimizer(trainer, watch)
    torch.manual_seed(1)
    try:
        trainer.train()
    finally:
        trainer_runs.report(trainer, watch, configuration, result)


def _texts(count: int, lengths: Sequence[int]) -> list[tuple[list[str], list[str]]]:
    """`count` different pairs of a prompt and an answer, in words of one token each."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(FIRST_WORD, 64)]
    return [(draw.choices(words, k=3), draw.choices(words, k=lengths[k % len(lengths)])) for k in range(count)]


def _rows(tokens: Any, pairs: Sequence[tuple[list[str], list[str]]]) -> list[Any]:
    """The rows that are trained on, each with the end token and without it: TRL's releases differ."""
    ids = [
        ([int(word[1:]) for word in prompt] + [ANSWER], [int(word[1:]) for word in answer]) for prompt, answer in pairs
    ]
    return [tokens.row(prompt, answer + end) for prompt, answer in ids for end in ([], [END])]


def _tokenizer() -> Any:
    """One token per word, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": PAD, "<end>": END, "<unk>": UNKNOWN, "answer": ANSWER}
    words = {f"w{number}": number for number in range(FIRST_WORD, 64)}
    plain = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", pad_token="<pad>", padding_side="right"
    )


def _arguments(trl: Any, base: Any, configuration: Configuration, pairs: Sequence[Any]) -> dict[str, Any]:
    """What this release's SFTTrainer takes: it learnt to mask a prompt by itself when it lost the collator for it."""
    from datasets import Dataset

    tokenizer = _tokenizer()
    known = inspect.signature(trl.SFTConfig).parameters
    longest = "max_length" if "max_length" in known else "max_seq_length"
    more: dict[str, Any] = {longest: 256, **({"bf16": False} if "bf16" in known else {})}
    taken = inspect.signature(base.__init__).parameters
    named = {"processing_class" if "processing_class" in taken else "tokenizer": tokenizer}
    if hasattr(trl, "DataCollatorForCompletionOnlyLM"):
        more["dataset_text_field"] = "text"
        text = [{"text": f"{' '.join(prompt)} answer {' '.join(answer)}"} for prompt, answer in pairs]
        named["data_collator"] = trl.DataCollatorForCompletionOnlyLM([ANSWER], tokenizer=tokenizer)
        data = Dataset.from_list(text)
    else:
        more |= {"completion_only_loss": True, "gradient_checkpointing": False}
        data = Dataset.from_list(
            [{"prompt": f"{' '.join(p)} answer", "completion": f" {' '.join(a)}"} for p, a in pairs]
        )
    arguments = trainer_runs.training_arguments(configuration, kind=trl.SFTConfig, **more)
    return {"args": arguments, "train_dataset": data, **named}


if __name__ == "__main__":
    trainer_runs.main(perform)
