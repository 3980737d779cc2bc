"""What is wrong with a window, in words: which micro-batches, ranks, parameters and tokens, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trainfix.ledger.audit import Finding
from trainfix.measure.balance import Balance
from trainfix.measure.evenness import Evenness

_OFF = 0.02  # coefficients and weights that are off by more are named
_SHOWN = 6  # of each kind


def of_balance(found: Finding, balance: Balance) -> Iterator[str]:
    """What the gradients show."""
    for ranks in found.twins:
        yield f"ranks {_listed(ranks)} have the same micro-batches: is the data not split over the ranks?"
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


def of_tokens(tokens: Evenness, flags: dict[str, int], found: Finding) -> tuple[list[str], list[str]]:
    """Problems and remarks on the tokens. flags: how many positions are remarkable, see `positions`."""
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
    some, others = flags["from the start"], flags["not from the start"]
    if some and others:
        count = f"{some} of {some + others} sequences"
        remarks.append(f"{count} are trained from their first token on, the others are not: a prompt without a mask?")
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
