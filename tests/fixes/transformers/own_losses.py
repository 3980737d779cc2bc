"""Losses of a user's own, and a program that trains with them: ``python -m tests.fixes.transformers.own_losses FILE``.

A result holds, for each optimizer step, a digest of the consumed gradient, and one of the gradient times the steps.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping
from typing import Any

from tests.support import trainer_runs
from tests.support.trainer_runs import Configuration, Result

STEPS = 4
LABELS = 3


def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A user's `compute_loss_func`: later tokens count more."""
    import torch

    losses = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:], reduction="none")
    return (losses * torch.arange(1, len(losses) + 1)).mean()


def _trainers() -> dict[str, Any]:
    from transformers import Trainer

    return {"overridden": type("OwnLoss", (Trainer,), {"compute_loss": compute_loss})}


def compute_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """A user's `compute_loss`."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    loss = weighted(outputs, labels)
    return (loss, outputs) if return_outputs else loss


def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
    """A user's `training_step`, which leaves the division to accelerate."""
    model.train()
    loss = model(**self._prepare_inputs(inputs)).loss
    self.accelerator.backward(loss)
    return loss.detach() / self.args.gradient_accumulation_steps


def perform(values: Mapping[str, Any], result: Result) -> None:
    """Train with the loss named in `case`, which ends in "step" where the user's own step computes it."""
    import torch
    import transformers

    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")

    said = _Said()
    result["release"] = transformers.__version__
    rows = [dict(one) for one in tokens.answers(2 * STEPS, lengths=(2, 7, 3, 9))]
    case, more = values["case"], dict(values.get("arguments", {}))
    model: Any = tokens.tiny_llama()
    if case == "classifier":
        model = transformers.LlamaForSequenceClassification(_with_labels(model.config))
        rows = [{**row, "labels": number % LABELS} for number, row in enumerate(rows)]
    if case == "masked":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=tokens.VOCABULARY, **sizes))
    base = _trainers().get(case, transformers.Trainer)
    if case == "own step":
        base = type("OwnStep", (transformers.Trainer,), {"training_step": training_step})
    own = {"compute_loss_func": weighted} if case == "function" else {}
    arguments = trainer_runs.training_arguments(Configuration(steps=STEPS, arguments=more))
    for _ in range(2):  # what is said of the first is not said again of the second
        trainer = base(
            model=model, args=arguments, train_dataset=trainer_runs.Rows(rows), data_collator=_collate, **own
        )
    result["smoother"] = trainer.label_smoother is not None
    consumed: list[Any] = []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: consumed.append(_gradient(model)))
    torch.manual_seed(1)
    trainer.train()
    result["bits"] = [_digest(one) for one in consumed]
    result["norms"] = [float(one.norm()) for one in consumed]
    result["bits times steps"] = [_digest(one * STEPS) for one in consumed]
    result["said"] = said.texts
    result["losses"] = [one["loss"] for one in trainer.state.log_history if "loss" in one]


class _Said(logging.Handler):
    """What trainfix says from here on."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logger = logging.getLogger("trainfix")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _with_labels(config: Any) -> Any:
    config.num_labels = LABELS
    return config


def _collate(rows: Any) -> Any:
    """One row as a micro-batch."""
    import torch

    (row,) = rows
    return {key: torch.tensor([value]) for key, value in row.items()}


def _gradient(model: Any) -> Any:
    import torch

    return torch.cat([one.grad.reshape(-1) for one in model.parameters() if one.grad is not None])


def _digest(gradient: Any) -> str:
    return hashlib.sha256(gradient.contiguous().numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    trainer_runs.main(importlib.import_module("tests.fixes.transformers.own_losses").perform)  # under its own name
