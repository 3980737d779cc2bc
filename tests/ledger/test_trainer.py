"""transformers' own Trainer under the ledger: found by itself, and what it logs compared with what was trained."""

from __future__ import annotations

import pytest
import transformers

from trainfix import settings
from trainfix.ledger.sink import Sink
from trainfix.ledger.watch import Watch
from trainfix.proofs.token_experiment import Rows, answers, collate, tiny_llama


@pytest.fixture
def watched(monkeypatch):
    said = []
    monkeypatch.setattr("trainfix.ledger.sink.report.inform", said.append)
    monkeypatch.setattr("trainfix.ledger.sink.report.warn", lambda text, **_: said.append(text))
    watch = Watch(settings.Ledger(first=2), Sink(None))
    watch.begin()
    yield watch, said
    watch.end()


def train(folder, kind=transformers.Trainer, **arguments):
    wanted = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(**wanted | arguments)
    kind(model=tiny_llama(), args=args, train_dataset=Rows(answers(12)), data_collator=collate).train()


def test_a_right_trainer_balances_and_its_log_is_right(watched, tmp_path):
    watch, said = watched
    train(tmp_path)
    assert [one.state for one in watch.verdicts] == ["balanced", "balanced"]
    assert [one.scale for one in watch.verdicts] == [1.0, 1.0]
    assert not [text for text in said if "the logged loss" in text]


class Exaggerating(transformers.Trainer):
    def log(self, logs, *args, **named):
        super().log({name: 3 * value if name == "loss" else value for name, value in logs.items()}, *args, **named)


def test_a_log_that_is_not_the_mean_loss_per_token_is_a_remark(watched, tmp_path):
    watch, said = watched
    train(tmp_path, Exaggerating)
    assert [one.state for one in watch.verdicts] == ["balanced", "balanced"]
    remarks = [text for text in said if "the logged loss is 3" in text]
    assert len(remarks) == 2
    assert "window 1: the logged loss is 3 times the mean loss per token" in remarks[0]


def test_logs_of_several_windows_at_once_are_not_compared(watched, tmp_path):
    _, said = watched
    train(tmp_path, Exaggerating, logging_steps=2)
    assert not [text for text in said if "the logged loss" in text]


class MeanOfMeans(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss / self.args.gradient_accumulation_steps


def test_a_trainer_with_a_mean_of_means_is_named(watched, tmp_path):
    watch, _ = watched
    train(tmp_path, MeanOfMeans)
    assert all("times as much as others" in one.problems[0] for one in watch.verdicts)
