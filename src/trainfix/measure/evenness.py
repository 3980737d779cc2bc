"""Does every trained token of a window enter the loss with the same weight, and all of them together with weight 1?

Plain torch arithmetic on what `next_token` found at sampled positions; nothing of trainfix is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

UNEVEN = 0.02  # weights that differ by more are not even, where the arithmetic is exact
NOT_PLAIN = 0.1  # what is left over of a gradient that no next-token loss explains
_EXACT = 1e-3
_STEPS = 4  # weights of more different sizes inside sequences are a weighted loss


@dataclass(frozen=True)
class Positions:
    """Sampled positions of all micro-batches of a window, float64 [positions] each.

    batch: the number of the position's micro-batch. passes: that of its forward pass. sequence: in it. weights,
    residuals, and with label smoothing smoothed, shares, left_over: see next_token.TokenFit. own, later, before: the
    residuals for the position's own token, the one after the next, and the one before, as its target. losses: the
    cross-entropies. trained: how many positions of the forward pass a gradient came back to.
    """

    batch: torch.Tensor
    passes: torch.Tensor
    sequence: torch.Tensor
    weights: torch.Tensor
    residuals: torch.Tensor
    smoothed: torch.Tensor
    shares: torch.Tensor
    left_over: torch.Tensor
    own: torch.Tensor
    later: torch.Tensor
    before: torch.Tensor
    losses: torch.Tensor
    trained: torch.Tensor


@dataclass(frozen=True)
class Evenness:
    """What a window's loss is made of.

    verdict: even; uneven: tokens count differently by micro-batch or sequence, or in steps within one; not plain: this
    is no next-token loss with one weight per token; negative: some tokens are made less likely, a preference or policy
    loss; token by token: weights that vary freely; nothing: no trained position was seen.
    weights: micro-batch -> its tokens' weight relative to the mean over tokens, 1 = right. tokens: micro-batch -> how
    many are trained. within: micro-batches whose own tokens differ, with the weight of each of their sequences' tokens.
    sums: micro-batch -> the sum of its tokens' weights,
    absolute. smoothing: the share of label smoothing, 0 without. noise: what is typically left over of a gradient.
    shifted: what most positions that the next token does not explain have as their target: own, later or before, "" for
    none of them; moved: how many these are. positions: trained ones seen.
    losses: micro-batch -> its mean cross-entropy per token.
    """

    verdict: str
    weights: Mapping[int, float]
    tokens: Mapping[int, int]
    within: Mapping[int, Mapping[int, float]]
    sums: Mapping[int, float]
    losses: Mapping[int, float]
    smoothing: float
    noise: float
    shifted: str
    moved: int
    positions: int


def evenness(seen: Positions) -> Evenness:
    """Judge the weights of a window's trained tokens."""
    largest = float(seen.weights.abs().max()) if len(seen.weights) else 0.0
    there = seen.weights.abs() > 1e-7 * largest
    if not bool(there.any()):
        return Evenness("nothing", {}, {}, {}, {}, {}, 0.0, 0.0, "", 0, 0)
    kept = Positions(*(column[there] for column in vars(seen).values()))
    weights, residuals, smoothing = _by_smoothing(kept)
    plain = residuals <= NOT_PLAIN
    noise = float(residuals[plain].median()) if bool(plain.any()) else float(residuals.median())
    shifted, moved = _shifted(kept, residuals)
    misfits = ~plain & ~moved
    numbers = sorted({int(one) for one in kept.batch})
    own_weights = {number: weights[(kept.batch == number) & plain] for number in numbers}
    middles = {number: float(own.median()) for number, own in own_weights.items() if len(own)}
    tokens = _tokens(kept, numbers)
    total = sum(tokens[number] for number in middles)
    mean = sum(middles[number] * tokens[number] for number in middles) / total if total else 0.0
    limit = max(UNEVEN, 4 * noise)
    apart = [number for number in middles if _spread(own_weights[number]) > max(UNEVEN, 10 * noise)]
    within = {
        number: _by_sequence(kept.sequence, weights / mean, (kept.batch == number) & plain) for number in apart if mean
    }
    relative = {number: one / mean for number, one in middles.items()} if mean else {}
    values = torch.tensor(list(relative.values()), dtype=torch.float64)
    if float(misfits.double().mean()) > 0.1 or not middles:
        verdict = "not plain"
    elif bool((weights[plain] < 0).any()):
        verdict = "negative"
    elif within and _is_free(kept, weights, plain, limit):
        verdict = "uneven" if _are_means(middles, tokens) else "token by token"
    else:
        verdict = "uneven" if within or _spread(values) > limit else "even"
    return Evenness(
        verdict=verdict,
        weights=relative,
        tokens=tokens,
        within=within,
        sums={number: float(own_weights[number].mean()) * tokens[number] for number in middles},
        losses={number: float(kept.losses[kept.batch == number].mean()) for number in numbers},
        smoothing=smoothing,
        noise=noise,
        shifted=shifted,
        moved=int(moved.sum()),
        positions=len(weights),
    )


def _by_smoothing(seen: Positions) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The weights, what is left over, and the share of label smoothing, where that is what explains the gradients."""
    alone, both = float(seen.residuals.median()), float(seen.left_over.median())
    share = float(seen.shares.median())
    alike = float((seen.shares - share).abs().median()) < 0.1 * abs(share)
    if alone > _EXACT and both < alone / 3 and 0.001 < share < 0.95 and alike:
        return seen.smoothed, seen.left_over, share
    return seen.weights, seen.residuals, 0.0


def _by_sequence(sequences: torch.Tensor, weights: torch.Tensor, where: torch.Tensor) -> dict[int, float]:
    return {
        number: float(weights[where & (sequences == number)].median())
        for number in sorted({int(one) for one in sequences[where]})
    }


def _shifted(seen: Positions, residuals: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Which other target explains the positions that the next token does not, and which of them. One that explains but
    a few is a coincidence: tokens repeat."""
    odd = residuals > NOT_PLAIN
    fits = {name: odd & (getattr(seen, name) < NOT_PLAIN / 2) for name in ("own", "later", "before")}
    best = max(fits, key=lambda name: int(fits[name].sum()))
    if 2 * int(fits[best].sum()) > int(odd.sum()):
        return best, fits[best]
    return "", torch.zeros_like(odd)


def _tokens(seen: Positions, numbers: list[int]) -> dict[int, int]:
    """Micro-batch -> trained tokens, summed over its forward passes."""
    found = dict.fromkeys(numbers, 0)
    passes = {(int(b), int(p)): int(n) for b, p, n in zip(seen.batch, seen.passes, seen.trained, strict=True)}
    for (batch, _), trained in passes.items():
        found[batch] += trained
    return found


def _spread(values: torch.Tensor) -> float:
    """(largest - smallest) / mean."""
    middle = float(values.mean().abs()) if len(values) else 0.0
    return float(values.max() - values.min()) / middle if middle else 0.0


def _is_free(seen: Positions, weights: torch.Tensor, plain: torch.Tensor, limit: float) -> bool:
    """Whether weights vary from token to token inside sequences, and do not come in a few steps."""
    relative = []
    for place in {(int(b), int(s)) for b, s in zip(seen.batch[plain], seen.sequence[plain], strict=True)}:
        own = weights[plain & (seen.batch == place[0]) & (seen.sequence == place[1])]
        relative.append(own / own.median())
    return len({int(one) for one in (torch.cat(relative) / limit).round()}) > _STEPS


def _are_means(weights: Mapping[int, float], tokens: Mapping[int, int]) -> bool:
    """Whether micro-batches count the same however many tokens they have: what a mean of their means looks like, also
    where each token has a weight of its own."""
    each = torch.tensor([weights[number] for number in weights], dtype=torch.float64)
    sums = each * torch.tensor([tokens[number] for number in weights], dtype=torch.float64)
    if len(each) < 2 or not bool((each > 0).all()):
        return False
    return _range(each) > 1.8 and _range(sums) < 1.5


def _range(values: torch.Tensor) -> float:
    return float(values.max() / values.min())
