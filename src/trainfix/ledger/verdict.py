"""A finding in words: does the window balance, and if not, what is wrong where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainfix.ledger.audit import Finding
from trainfix.ledger.tokens import COLUMNS
from trainfix.measure.balance import Balance
from trainfix.measure.evenness import Evenness, Positions, evenness

BALANCED, UNBALANCED, UNCLEAR = "balanced", "not balanced", "could not tell"

_OFF = 0.02  # coefficients and scales that are off by more are named
_ROUGH = 0.25  # the absolute scale, where gradients are so rough that label smoothing cannot be told from a smaller one
_LEAST_LOSS_SCALE = 2**7
_SAME = 1e-5
_SHOWN = 6


@dataclass(frozen=True)
class Verdict:
    """What one window shows. problems: what is wrong; remarks: what is worth knowing; unclear: what could not be seen.

    scale: the gradient relative to that of the mean loss per token; None where it cannot be seen.
    """

    finding: Finding
    tokens: Evenness | None
    scale: float | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    unclear: tuple[str, ...]

    @property
    def state(self) -> str:
        if self.problems:
            return UNBALANCED
        return UNCLEAR if self.unclear else BALANCED

    def line(self) -> str:
        """One line for people."""
        where = f"window {self.finding.window}" + (f" of {self.finding.optimizer}" if self.finding.optimizer else "")
        count = len(self.finding.backwards)
        counted = f"{count} micro-batch{'es' if count != 1 else ''}"
        if self.finding.ranks > 1:
            counted += f" on {self.finding.ranks} ranks"
        told = self.problems or self.unclear
        if told:
            return f"{where}: {self.state.upper()}: {'; '.join(told)}"
        tokens = self.tokens
        even = (
            f", {sum(tokens.tokens.values())} tokens with equal weight" if tokens and tokens.verdict == "even" else ""
        )
        return f"{where}: balanced, {counted}{even}"

    def record(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        found, tokens = self.finding, self.tokens
        balance = found.balance
        coefficients = balance.coefficients if balance else ()
        rows = []
        for number, (rank, backward) in enumerate(found.backwards):
            row: dict[str, Any] = {"rank": rank, "micro_batch": backward, "coefficient": coefficients[number]}
            if tokens is not None and number in tokens.tokens:
                row |= {
                    "tokens": tokens.tokens[number],
                    "token_weight": tokens.weights.get(number),
                    "loss_per_token": tokens.losses.get(number),
                    "weight_sum": tokens.sums.get(number),
                }
            rows.append(row)
        return {
            "window": found.window,
            "optimizer": found.optimizer,
            "state": self.state,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "unclear": list(self.unclear),
            "ranks": found.ranks,
            "micro_batches": rows,
            "earlier": list(balance.earlier) if balance else [],
            "residual": balance.residual if balance else None,
            "determined": balance.determined if balance else None,
            "gradient_scale": balance.scale if balance else None,
            "parameters": {
                name: scale if math.isfinite(scale) else None for name, scale in list(found.outliers.items())[:100]
            },
            "token_weights": None if tokens is None else tokens.verdict,
            "label_smoothing": tokens.smoothing if tokens else None,
            "noise": tokens.noise if tokens else None,
            "scale_of_mean_loss": self.scale,
        }


def judge(found: Finding, before: Finding | None = None) -> Verdict:
    """The verdict on a window. before: the finding on the same optimizer's window before."""
    seen, flags = _positions(found)
    tokens = evenness(seen) if len(seen.batch) else None
    if tokens is not None and tokens.verdict == "nothing":
        tokens = None
    problems: list[str] = []
    remarks: list[str] = []
    unclear = [found.incomplete] if found.incomplete else []
    if not found.incomplete and found.balance is not None:
        problems += _of_balance(found, found.balance)
        if found.balance.verdict == "unclear":
            remarks.append("the micro-batches are too alike to tell whether each is there once")
        if found.balance.clipped_at:
            remarks.append("elements of the gradient are clipped by value")
        if found.balance.rough:
            remarks.append(
                f"gradients are added up in less precision than they come in: off by up to {found.balance.rough:.1%}"
            )
    if found.silent:
        listed = ", ".join(found.silent[:3]) + (", ..." if len(found.silent) > 3 else "")
        count = f"{len(found.silent)} of {found.parameters} parameters that are stepped"
        remarks.append(f"{count} got no gradient from any micro-batch: {listed}")
    for rank, number in found.given_up.items():
        remarks.append(
            f"rank {rank}: {number} backwards were not consumed: another optimizer's step or a gradient that was not "
            "finite came after them"
        )
    scale = None
    if tokens is not None:
        more, notes = _of_tokens(tokens, flags, found)
        problems += more
        remarks += notes
        scale = None if found.incomplete else _scale(tokens, found, before)
        if scale is not None and abs(scale - 1) > (max(_OFF, 5 * tokens.noise) if tokens.noise < 1e-3 else _ROUGH):
            problems += _of_scale(scale, tokens, remarks)
    elif found.unseen:
        remarks.append("token weights were not seen: a rank holds only a part of the output matrix")
    return Verdict(found, tokens, scale, tuple(problems), tuple(remarks), tuple(unclear))


def _of_balance(found: Finding, balance: Balance) -> Iterator[str]:
    if found.apart:
        yield f"ranks consume different gradients at {found.apart:.0%} of what was looked at"
    if balance.verdict != "unbalanced":
        return
    if found.of_ranks and all(_only_own(found, rank, one) for rank, one in found.of_ranks.items()):
        yield "each rank consumes its own micro-batches alone: the gradients are not averaged over the ranks"
        return
    if found.of_ranks and all(one.verdict == "balanced" for one in found.of_ranks.values()):
        scales = ", ".join(f"{one.scale * found.ranks:.3g} on rank {rank}" for rank, one in found.of_ranks.items())
        yield f"ranks scale their parts of the gradient differently: {scales}"
        return
    told = list(_coefficients(found, balance))
    if balance.residual > _OFF:
        told.append(f"{balance.residual:.1%} of the gradient comes from none of the micro-batches")
    if balance.outliers and (not told or len(found.outliers) < 0.5 * _looked_at(found)):
        told.insert(0, _parameters(found))
    if not balance.determined and len(found.outliers) > _looked_at(found) / 2:
        told.append("the micro-batches are too alike to name each one")
    yield "; ".join(told) if told else _parameters(found)


def _coefficients(found: Finding, balance: Balance) -> Iterator[str]:
    kinds: dict[str, list[int]] = {}
    for place, value in enumerate(balance.coefficients):
        if abs(value - 1) > _OFF:
            kinds.setdefault("dropped" if abs(value) < _OFF else f"counted {value:.3g} times", []).append(place)
    for what, places in list(kinds.items())[:_SHOWN]:
        verb = "is" if len(places) == 1 else "are"
        yield f"{_named(found, places)} of {len(found.backwards)} {verb} {what}"
    if len(kinds) > _SHOWN:
        yield "and so on"
    stale = [number + 1 for number, value in enumerate(balance.earlier) if abs(value) > _OFF]
    if stale:
        yield f"gradients of the window before are added again (its micro-batches {_listed(stale)})"


def _named(found: Finding, places: Sequence[int]) -> str:
    """``micro-batches 2, 3 of rank 0 and 2 of rank 1``."""
    ranks: dict[int, list[int]] = {}
    for place in places:
        rank, number = found.backwards[place]
        ranks.setdefault(rank, []).append(number + 1)
    several = len({rank for rank, _ in found.backwards}) > 1
    named = [_listed(own) + (f" of rank {rank}" if several else "") for rank, own in list(ranks.items())[:_SHOWN]]
    more = f" and of {len(ranks) - _SHOWN} more ranks" if len(ranks) > _SHOWN else ""
    return ("micro-batch " if len(places) == 1 else "micro-batches ") + " and ".join(named) + more


def _listed(numbers: Sequence[int]) -> str:
    """``2 to 7``, ``1, 3``, or the first few."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:_SHOWN])) + (
        f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    )


def _parameters(found: Finding) -> str:
    named = [f"{name} ({_factor(scale)})" for name, scale in list(found.outliers.items())[:_SHOWN]]
    rest = len(found.outliers) - len(named)
    return f"{len(found.outliers)} of the parameters are off: {', '.join(named)}" + (
        f" and {rest} more" if rest else ""
    )


def _factor(scale: float) -> str:
    if abs(scale) < _OFF:
        return "nothing arrives"
    return f"{scale:.3g} times what it should be" if math.isfinite(scale) else "more arrives than came in"


def _looked_at(found: Finding) -> int:
    return max(1, found.parameters)


def _only_own(found: Finding, rank: int, balance: Balance) -> bool:
    pairs = zip(found.backwards, balance.coefficients, strict=True)
    own = [abs(value) > 0.5 if of == rank else abs(value) < 0.1 for (of, _), value in pairs]
    return all(own) and balance.residual < 0.1


def _of_tokens(tokens: Evenness, flags: dict[str, int], found: Finding) -> tuple[list[str], list[str]]:
    problems, remarks = [], []
    if tokens.shifted:
        what = {
            "own": "labels are not shifted: {} trained positions predict themselves",
            "later": "labels are shifted twice: {} trained positions predict the token after the next",
            "before": "labels are shifted the wrong way: {} trained positions predict the token before",
        }[tokens.shifted]
        problems.append(what.format(f"{tokens.moved} of {tokens.positions}"))
    texts = {
        "padding": "trained positions predict padding",
        "crossing": "trained positions predict the first token of the next document",
        "unlabelled": "positions are trained although their label is masked",
        "unweighted": "positions have a label but no weight in the loss",
    }
    if tokens.verdict in ("even", "uneven"):
        problems += [f"{flags[name]} {text}" for name, text in texts.items() if flags[name]]
    if tokens.verdict == "uneven":
        problems.append(_uneven(tokens, found))
    notes = {
        "not plain": "the loss is not a plain next-token loss: token weights are not judged",
        "negative": "some token weights are negative, as in a preference or policy loss: they are not judged",
        "token by token": "weights vary from token to token, as in a weighted loss: they are not judged",
    }
    if tokens.verdict in notes:
        remarks.append(notes[tokens.verdict])
    if tokens.smoothing:
        remarks.append(f"label smoothing of {tokens.smoothing:.3g}")
    return problems, remarks


def _uneven(tokens: Evenness, found: Finding) -> str:
    told = []
    values = tokens.weights
    if values and max(values.values()) - min(values.values()) > _OFF:
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        ratio = values[high] / values[low] if values[low] else float("inf")
        told.append(
            f"tokens count up to {ratio:.3g} times as much as others: those of {_name(found, high)} "
            f"({tokens.tokens[high]} tokens) {values[high]:.3g}, of {_name(found, low)} ({tokens.tokens[low]}) "
            f"{values[low]:.3g}, where 1 is right"
        )
    for number, sequences in list(tokens.within.items())[:2]:
        least, most = min(sequences.values()), max(sequences.values())
        between = f"between {least:.3g} and {most:.3g} from sequence to sequence"
        told.append(
            f"inside {_name(found, number)} tokens count differently"
            + (f": {between}" if most - least > _OFF else " from position to position")
        )
    return "; ".join(told)


def _name(found: Finding, number: int) -> str:
    rank, backward = found.backwards[number]
    return f"micro-batch {backward + 1}" + (f" of rank {rank}" if found.ranks > 1 else "")


def _scale(tokens: Evenness, found: Finding, before: Finding | None) -> float | None:
    """The consumed gradient relative to that of the mean loss per token, before clipping; None if it cannot be seen."""
    if tokens.verdict not in ("even", "uneven") or found.balance is None or tokens.shifted:
        return None
    seen = {(int(rank), int(number)) for rank, number in zip(found.tokens[0], found.tokens[1], strict=True)}
    if not seen.issuperset(found.backwards) or found.balance.verdict == "unbalanced":
        return None
    total = sum(tokens.sums.values())
    consumed, mean = total * found.balance.scale, total / found.ranks
    limit = max(_OFF, 5 * tokens.noise)
    reached = found.balance.scale * found.ranks  # below 1 where the gradient is clipped, or was scaled up before
    if abs(consumed - 1) <= limit:
        return 1.0
    if abs(mean - 1) <= limit and reached <= 1 + limit:
        return consumed if _is_constant(found, before) else 1.0
    # A loss scale is a power of two, and is taken back before the step.
    power = round(math.log2(mean)) if mean > 0 else 0
    if 2**power >= _LEAST_LOSS_SCALE and reached * 2**power <= 1 + limit:
        unscaled: float = mean / 2**power
        return 1.0 if abs(unscaled - 1) <= limit else unscaled
    return consumed if consumed > 1 else mean


def _is_constant(found: Finding, before: Finding | None) -> bool:
    """Whether two windows of different size are scaled down by the same factor, which clipping would not do."""
    if before is None or before.balance is None or found.balance is None or before.balance.verdict != "balanced":
        return False
    alike = abs(before.balance.scale / found.balance.scale - 1) < _SAME
    return alike and abs(before.size / found.size - 1) > 100 * _SAME


def _of_scale(scale: float, tokens: Evenness, remarks: list[str]) -> list[str]:
    count = sum(tokens.tokens.values())
    if count > 1 and abs(scale / count - 1) < _OFF:
        remarks.append("the loss is the sum over all tokens, not their mean")
        return []
    return [f"the gradient is {scale:.4g} times that of the mean loss per token"]


def _positions(found: Finding) -> tuple[Positions, dict[str, int]]:
    """The sampled positions, by the numbers of `found.backwards`, and how many of them are remarkable."""
    numbers = {backward: number for number, backward in enumerate(found.backwards)}
    table = _together(found.tokens)
    places = [numbers.get((int(rank), int(k)), -1) for rank, k in zip(table[0], table[1], strict=True)]
    batch = torch.tensor(places, dtype=torch.float64)
    columns = dict(zip(COLUMNS, table[2:][:, batch >= 0], strict=True))
    batch = batch[batch >= 0]
    trained = columns["weight"].abs() > 1e-7 * _largest(columns["weight"])
    flags = {
        "padding": int((trained & (columns["padding"] > 0)).sum()),
        "crossing": int((trained & (columns["crossing"] > 0)).sum()),
        "unlabelled": int((trained & (columns["label"] == 0)).sum()),
        "unweighted": int((~trained & (columns["label"] == 1)).sum()),
    }
    seen = Positions(
        batch=batch,
        passes=columns["pass"],
        sequence=columns["sequence"],
        weights=columns["weight"],
        residuals=columns["residual"],
        smoothed=columns["smoothed"],
        shares=columns["share"],
        left_over=columns["left_over"],
        own=columns["own"],
        later=columns["later"],
        before=columns["before"],
        losses=columns["loss"],
        trained=columns["trained"],
    )
    return seen, flags


def _together(table: torch.Tensor) -> torch.Tensor:
    """One column for each position of a pass: its weights added up where several backwards went through it."""
    place = {name: number + 2 for number, name in enumerate(COLUMNS)}
    keys = [0, place["pass"], place["sequence"], place["position"]]
    _, where = torch.unique(table[keys], dim=1, return_inverse=True)
    if not len(where) or int(where.max()) + 1 == len(where):
        return table
    first = torch.full((int(where.max()) + 1,), len(where)).scatter_reduce(0, where, torch.arange(len(where)), "amin")
    merged = table[:, first]
    for name in ("weight", "smoothed"):
        merged[place[name]] = torch.zeros(len(first), dtype=table.dtype).index_add_(0, where, table[place[name]])
    return merged


def _largest(values: Sequence[float] | torch.Tensor) -> float:
    return float(torch.as_tensor(values).abs().max()) if len(values) else 0.0
