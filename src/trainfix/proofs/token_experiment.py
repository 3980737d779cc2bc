"""The experiment that the proofs of losses share: does every trained token count the same?

A tiny causal language model is trained on answers of very different lengths by the framework's own trainer. What its
optimizer consumes is compared with the gradient of (sum of the tokens' losses) / (number of trained tokens), over all
ranks and micro-batches of the window, by plain autograd in float64 at the same weights.

Runs only in a child interpreter (see `trainfix.proofs.prove`).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..measure.coefficients import measure
from ..measure.token_weights import token_weights
from . import experiment

IGNORED = -100
VOCABULARY = 64
LENGTHS = (2, 3, 4, 2, 61, 2, 91, 61)  # trained tokens of the answers, micro-batch by micro-batch, over and over
PROMPT = 4

Row = dict[str, list[int]]
TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [tokens, vocabulary] of the trained tokens, their labels [tokens]) -> the loss of each token [tokens]."""


def run(train: Callable[[], Watch], *, packages: Sequence[str], ranks: int = 1, tolerance: float = 1e-4) -> None:
    """Call `train`, on each of the ranks, and print one JSON object: the worst of its windows.

    `packages` are the distributions whose versions it names beside torch's. `tolerance` is the relative error that
    counts as right. The process group (gloo) of several ranks is there when `train` is called, and the variables that a
    launcher sets; a lone process has neither.
    """
    write = experiment.only_json_to_stdout()
    with experiment.all_ranks(ranks) as (rank, store):
        torch.set_num_threads(1)
        if ranks > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({name: str(value) for name, value in places.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, and not used: there is a store
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        windows = train().windows
        if not windows:
            raise RuntimeError("no optimizer step was seen")
        worst = max(windows, key=lambda window: float(window["relative_error"]))
        if rank == 0:
            versions = {name: importlib.metadata.version(name) for name in (*packages, "torch")}
            judged_by = {"tolerance": tolerance, "not_this_error": []}
            write(
                {**worst, "current": worst["coefficients"], "packages": versions}
                | judged_by
                | {"status": experiment.status()}
            )
        if ranks > 1:
            torch.distributed.barrier()


def train_with_transformers(
    *,
    steps: int = 8,
    rows: int = 2 * len(LENGTHS),
    lengths: Sequence[int] = LENGTHS,
    losses: TokenLosses | None = None,
    takes_count: bool = True,
    **arguments: Any,
) -> Watch:
    """Train the tiny model with transformers' own Trainer for two windows, one row per micro-batch, and watch it.

    `steps` is gradient_accumulation_steps, `rows` counts over all ranks, `arguments` are more TrainingArguments. With
    `takes_count` False the model takes no number of tokens, as LLaMA-Factory declares those with a processor.
    """
    import transformers

    model = tiny_llama()
    watch = Watch(model, losses=losses or cross_entropy)
    data = answers(rows, lengths=lengths)
    watch.learn(data)
    with tempfile.TemporaryDirectory() as folder:
        wanted: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": steps,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            **({"ddp_backend": "gloo"} if "RANK" in os.environ and "deepspeed" not in arguments else {}),
            **arguments,
        }
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**wanted),
            train_dataset=Rows(data),
            data_collator=collate,
        )
        if not takes_count:
            trainer.model_accepts_loss_kwargs = False
        optimizer = trainer.create_optimizer()
        watch.attach(optimizer)
        trainer.train()
    return watch


class Rows(torch.utils.data.Dataset[Row]):
    """A data set of these rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def answers(count: int, *, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Row]:
    """`count` different rows: a masked prompt and a trained answer; the k-th answer has ``lengths[k % ...]`` tokens."""
    draw = random.Random(seed)
    rows = []
    for k in range(count):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(PROMPT)]
        answer = [draw.randrange(3, VOCABULARY) for _ in range(lengths[k % len(lengths)])]
        rows.append(row(prompt, answer))
    return rows


def row(prompt: list[int], answer: list[int]) -> Row:
    """One row whose prompt is masked."""
    ids = prompt + answer
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + answer, "attention_mask": [1] * len(ids)}


def collate(rows: Iterable[Row]) -> dict[str, torch.Tensor]:
    """Rows as one micro-batch [rows, longest], padded on the right with token 0, which is neither seen nor trained."""
    rows = list(rows)
    longest = max(len(one["input_ids"]) for one in rows)
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    return {
        key: torch.tensor([one[key] + [value] * (longest - len(one[key])) for one in rows])
        for key, value in fill.items()
    }


def tiny_llama(**changes: Any) -> torch.nn.Module:
    """A random LlamaForCausalLM of some 5,000 parameters, in float32, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **{**sizes, **heads, **changes})
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each token [tokens]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def smoothed(share: float) -> TokenLosses:
    """The loss of each token [tokens] where `share` of its label is spread over the whole vocabulary."""
    return functools.partial(torch.nn.functional.cross_entropy, reduction="none", label_smoothing=share)


class Watch:
    """Records the micro-batches that go through a model, and judges what its optimizer consumes, window by window.

    Call `learn` with every row that is trained on, and `judge` when an optimizer step begins, on all ranks alike.
    `windows` holds one report for each: `coefficients`, `relative_error`, `cosine`, `norm_ratio`, ... of
    `measure.coefficients`; `tokens` per micro-batch, ranks in order; `weights` and `scale` of `measure.token_weights`;
    `exact_loss` and `exact_norm`, what a person should see logged; `sha256` of the consumed gradient.
    """

    def __init__(self, model: torch.nn.Module, *, losses: TokenLosses = cross_entropy) -> None:
        self.model, self.losses = model, losses
        self.twin = copy.deepcopy(model).double()
        self.labels: dict[tuple[int, ...], list[int]] = {}
        self.seen: list[list[tuple[int, ...]]] = []
        self.windows: list[dict[str, Any]] = []
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def learn(self, rows: Iterable[Row]) -> None:
        """Remember the labels of these rows. They are known again by their input ids, so these must differ."""
        for one in rows:
            self.labels[tuple(one["input_ids"])] = list(one["labels"])

    def _record(self, model: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        ids = named["input_ids"] if "input_ids" in named else args[0]
        self.seen.append([self._known(list(line)) for line in ids.tolist()])

    def _known(self, ids: list[int]) -> tuple[int, ...]:
        """The row that these ids are, without what pads them on either side."""
        for begin in range(len(ids)):
            for end in range(len(ids), begin, -1):
                if tuple(ids[begin:end]) in self.labels:
                    return tuple(ids[begin:end])
                if ids[end - 1] != ids[-1]:
                    break
            if ids[begin] != ids[0]:
                break
        raise LookupError(f"a row that the experiment does not know: {ids}")

    def judge(self, consumed: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """Report on the window that ends with this gradient [elements of the trained parameters, in their order].

        `weights` is the state that the window's micro-batches met, where the model holds another by now.
        """
        own, self.seen = self.seen, []
        batches = _from_all_ranks(own)
        counts = [sum(self._count(ids) for ids in batch) for batch in batches]
        total = max(sum(counts), 1)
        self.twin.load_state_dict(self.model.state_dict() if weights is None else weights)
        losses, rows = [], []
        for batch in batches:
            loss = sum((self._sum(ids) for ids in batch), torch.zeros((), dtype=torch.float64)) / total
            losses.append(float(loss))
            rows.append(self._gradient(loss))
        stacked = torch.stack(rows)
        found = asdict(measure(stacked, consumed))
        split = asdict(token_weights(found["current"], counts)) if sum(counts) else {"weights": (), "scale": 1.0}
        found["coefficients"] = found.pop("current")
        exact = {"exact_loss": sum(losses), "exact_norm": float(torch.linalg.vector_norm(stacked.sum(0)))}
        bits = {"sha256": hashlib.sha256(consumed.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]}
        self.windows.append({**found, **split, **exact, **bits, "tokens": counts})
        return self.windows[-1]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Judge every step of this optimizer, whose gradients are those that the parameters hold."""

        def look(*_: Any) -> None:
            self.judge(self.consumed())

        optimizer.register_step_pre_hook(look)

    def consumed(self) -> torch.Tensor:
        """The gradients that the model's parameters hold [elements], zero for one that has none."""
        parameters = dict(self.model.named_parameters())
        gradients = [parameters[name].grad for name in self.trained]
        shapes = [parameters[name] for name in self.trained]
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(shapes, gradients, strict=True)]
        return torch.cat([one.detach().reshape(-1).double() for one in whole])

    def _count(self, ids: tuple[int, ...]) -> int:
        return sum(label != IGNORED for label in self.labels[ids][1:])

    def _sum(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The sum of the losses of this row's trained tokens, in float64."""
        logits = self.twin(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        labels = torch.tensor(self.labels[ids][1:])
        kept = labels != IGNORED
        return self.losses(logits[kept], labels[kept]).sum()

    def _gradient(self, loss: torch.Tensor) -> torch.Tensor:
        parameters = [parameter for name, parameter in self.twin.named_parameters() if name in set(self.trained)]
        if not loss.requires_grad:
            return torch.cat([torch.zeros_like(parameter).reshape(-1) for parameter in parameters])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        return torch.cat([(torch.zeros_like(own) if one is None else one).reshape(-1) for own, one in pairs])


def _from_all_ranks(own: list[Any]) -> list[Any]:
    """Every rank's list, one after the other."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return [one for part in found for one in part]
