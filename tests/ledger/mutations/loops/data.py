"""What the loops share: a tiny Llama of two layers, and windows of micro-batches with unequal numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainfix.proofs import token_experiment as tiny

LENGTHS = (7, 23, 3, 41, 12, 5, 31, 9, 17, 4)  # trained tokens of a row, over and over
WINDOWS = (3, 3, 2)  # micro-batches; the last window is a partial one
ROWS = 2  # of a micro-batch


def model(**changes):
    return tiny.tiny_llama(num_hidden_layers=2, **changes)


def rows(count):
    return tiny.answers(count, lengths=LENGTHS)


def windows(rank=0, ranks=1, *, left=False, packed=False, sizes: Sequence[int] = WINDOWS):
    """Each window of this rank, a list of micro-batches."""
    all_rows = rows(ROWS * sum(sizes) * ranks)
    own = iter([all_rows[k : k + ROWS] for k in range(rank * ROWS, len(all_rows), ROWS * ranks)])
    make = pack if packed else collate_left if left else tiny.collate
    return [[make(next(own)) for _ in range(size)] for size in sizes]


def collate_left(some):
    """Padded in front."""
    longest = max(len(one["input_ids"]) for one in some)
    fill = {"input_ids": 0, "labels": tiny.IGNORED, "attention_mask": 0}
    return {
        key: torch.tensor([[value] * (longest - len(one[key])) + one[key] for one in some])
        for key, value in fill.items()
    }


def pack(some):
    """One row of several documents; where one begins, nothing is to be predicted from the one before."""
    ids, labels, places = [], [], []
    for one in some:
        ids += one["input_ids"]
        labels += [tiny.IGNORED, *one["input_ids"][1:]]
        places += range(len(one["input_ids"]))
    return {
        key: torch.tensor([value])
        for key, value in zip(("input_ids", "labels", "position_ids"), (ids, labels, places), strict=True)
    }


def count(batch):
    """The trained tokens of a micro-batch."""
    return int((batch["labels"][:, 1:] != tiny.IGNORED).sum())


def token_losses(logits, labels):
    """The loss of each token [sequences, positions - 1], 0 where none is to be predicted."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    flat = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return flat.reshape(labels.shape)
