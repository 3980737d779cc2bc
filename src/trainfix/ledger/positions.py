"""A finding's sampled positions, as `measure.evenness` takes them."""

from __future__ import annotations

from dataclasses import fields

import torch

from trainfix.ledger.audit import Finding
from trainfix.ledger.tokens import COLUMNS
from trainfix.measure.evenness import Positions


def positions(found: Finding) -> tuple[Positions, dict[str, int]]:
    """The sampled positions, by the numbers of `found.backwards`, and how many of them are remarkable."""
    numbers = {backward: number for number, backward in enumerate(found.backwards)}
    table = _together(found.tokens)
    places = [numbers.get((int(rank), int(k)), -1) for rank, k in zip(table[0], table[1], strict=True)]
    batch = torch.tensor(places, dtype=torch.float64)
    columns = dict(zip(COLUMNS, table[2:][:, batch >= 0], strict=True))
    batch = batch[batch >= 0]
    trained = columns["weights"].abs() > 1e-7 * _largest(columns["weights"])
    flags = {
        "padding": int((trained & (columns["padding"] > 0)).sum()),
        "crossing": int((trained & (columns["crossing"] > 0)).sum()),
        "unlabelled": int((trained & (columns["label"] == 0)).sum()),
        "unweighted": int((~trained & (columns["label"] == 1)).sum()),
        "from the start": int((trained & (columns["position"] == 0)).sum()),
        "not from the start": int((~trained & (columns["position"] == 0) & (columns["padding"] == 0)).sum()),
    }
    names = [field.name for field in fields(Positions) if field.name != "batch"]
    seen = Positions(batch=batch, **{name: columns[name] for name in names})
    return seen, flags


def _together(table: torch.Tensor) -> torch.Tensor:
    """One column for each position of a pass: its weights added up where several backwards went through it."""
    place = {name: number + 2 for number, name in enumerate(COLUMNS)}
    keys = [0, place["passes"], place["sequence"], place["position"]]
    _, where = torch.unique(table[keys], dim=1, return_inverse=True)
    if not len(where) or int(where.max()) + 1 == len(where):
        return table
    first = torch.full((int(where.max()) + 1,), len(where)).scatter_reduce(0, where, torch.arange(len(where)), "amin")
    merged = table[:, first]
    for name in ("weights", "smoothed"):
        merged[place[name]] = torch.zeros(len(first), dtype=table.dtype).index_add_(0, where, table[place[name]])
    return merged


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0
