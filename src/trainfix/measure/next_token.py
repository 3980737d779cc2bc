"""Token weights seen from outside: from the gradient that reaches the hidden state in front of the output matrix.

Let h be a position's hidden state, W the output matrix and y the next token. A token-weighted cross-entropy, however it
is computed (fused, chunked, compiled), sends back to h

    w * J^T (softmax(z) - onehot(y)),    z = logits(h) = cap(scale * (W h + b)),    J = dz / dh

so the weight w is the projection of the gradient on that direction, and what is left over says whether the loss is a
plain next-token loss at all. Label smoothing by e adds w * e * J^T (onehot(y) - 1/vocabulary), a second direction.
Only the model's inputs are needed for y, never the framework's labels.
Plain torch arithmetic; the vocabulary is gone through piece by piece, so that a large one takes little memory. Nothing
of trainfix is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ELEMENTS = 2**21  # of a piece of the logits, or of the matrix: 16 MiB in float64
_EXACT_WORK = 2**22  # products up to this many multiplications are done in float64, larger ones in float32


@dataclass(frozen=True)
class Output:
    """How logits are made of hidden states.

    matrix: [vocabulary, hidden]. bias: [vocabulary] or None. scale: what logits are multiplied with (Granite divides by
    its logits_scaling, Cohere multiplies with its logit_scale). cap: c of c * tanh(z / c) (Gemma's
    final_logit_softcapping), None where there is none. mean: of the matrix's rows [hidden], where it is known already.
    """

    matrix: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    mean: torch.Tensor | None = None


@dataclass(frozen=True)
class Directions:
    """What the losses of targets send back to their hidden states.

    plain: the gradient of each target's cross-entropy, float64 [positions, hidden]. smoothing: what smoothing by all of
    it would add [positions, hidden]. losses: the cross-entropies [positions].
    """

    plain: torch.Tensor
    smoothing: torch.Tensor
    losses: torch.Tensor


@dataclass(frozen=True)
class TokenFit:
    """What the gradient at each position says, float64 [positions].

    weights: with which weight the token entered the loss; 0 where no gradient arrived.
    residuals: the part of the gradient that no weight of this token explains, relative to the gradient; 0 = explained.
    smoothed, shares, left_over: the same three, weight, share of label smoothing, and residual, where both directions
    may explain the gradient.
    """

    weights: torch.Tensor
    residuals: torch.Tensor
    smoothed: torch.Tensor
    shares: torch.Tensor
    left_over: torch.Tensor


def fit(gradient: torch.Tensor, directions: Directions) -> TokenFit:
    """Explain `gradient` [positions, hidden] by the losses that `directions` are of.

    Raises ValueError, naming the shapes, when they do not fit together.
    """
    if gradient.shape != directions.plain.shape:
        wanted, got = list(directions.plain.shape), list(gradient.shape)
        raise ValueError(f"the gradient must be [positions, hidden], {wanted} as the directions, not {got}")
    arrived = gradient.detach().to(torch.float64)
    plain, smoothing = directions.plain, directions.smoothing
    size = torch.linalg.vector_norm(arrived, dim=-1)
    weights, residuals = _projected(arrived, plain, size)
    # The second direction without what it shares with the first.
    shared = _over((smoothing * plain).sum(-1), (plain * plain).sum(-1))
    rest = smoothing - shared[:, None] * plain
    amount = _over((arrived * rest).sum(-1), (rest * rest).sum(-1))
    smoothed = weights - amount * shared
    left = torch.linalg.vector_norm(arrived - smoothed[:, None] * plain - amount[:, None] * smoothing, dim=-1)
    return TokenFit(weights, residuals, smoothed, _over(amount, smoothed), _over(left, size))


def misfit(gradient: torch.Tensor, directions: Directions) -> torch.Tensor:
    """What `fit` has as `residuals`, alone."""
    arrived, plain = gradient.detach().to(torch.float64), directions.plain
    return _projected(arrived, plain, torch.linalg.vector_norm(arrived, dim=-1))[1]


def _projected(arrived: torch.Tensor, plain: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of `plain` in what arrived, and what is left over relative to its size."""
    weights = _over((arrived * plain).sum(-1), (plain * plain).sum(-1))
    return weights, _over(torch.linalg.vector_norm(arrived - weights[:, None] * plain, dim=-1), size)


def mean_of(matrix: torch.Tensor) -> torch.Tensor:
    """The mean of an output matrix's rows [hidden]."""
    wide = torch.float64 if matrix.numel() <= _EXACT_WORK else torch.float32
    return matrix.detach().mean(0, dtype=wide)


def directions(hidden: torch.Tensor, output: Output, targets: torch.Tensor) -> Directions:
    """The directions of `targets`, int [positions], at the hidden states [positions, hidden].

    Raises ValueError, naming the shapes, when they do not fit together.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        got = f"{list(hidden.shape)} and {list(targets.shape)}"
        raise ValueError(f"hidden must be [positions, hidden] and targets [positions], not {got}")
    if output.matrix.dim() != 2 or output.matrix.shape[1] != hidden.shape[1]:
        raise ValueError(f"the output matrix must be [vocabulary, {hidden.shape[1]}], not {list(output.matrix.shape)}")
    rows = max(1, _ELEMENTS // max(1, output.matrix.shape[0]))
    parts = [
        _directions(h, output, y) for h, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    if not parts:
        empty = torch.zeros_like(hidden, dtype=torch.float64)
        return Directions(empty, empty, empty.sum(-1))
    plain, smoothing, losses = zip(*parts, strict=True)
    return Directions(torch.cat(plain), torch.cat(smoothing), torch.cat(losses))


def towards(
    found: Directions, hidden: torch.Tensor, output: Output, targets: torch.Tensor, others: Sequence[torch.Tensor]
) -> list[Directions]:
    """The directions of each of `others`, int [positions], from those `found` for `targets`."""
    pull, logits = _pull(hidden, output, targets)
    moved = []
    for other in others:
        its_pull, its_logits = _pull(hidden, output, other)
        by = pull - its_pull
        moved.append(Directions(found.plain + by, found.smoothing - by, found.losses + logits - its_logits))
    return moved


def _directions(
    hidden: torch.Tensor, output: Output, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vocabulary, size = output.matrix.shape
    exact = len(hidden) * vocabulary * size <= _EXACT_WORK
    wide = torch.float64 if exact else torch.float32
    rows = max(1, _ELEMENTS // size)
    states = hidden.detach().to(wide)

    def pieces() -> list[tuple[slice, torch.Tensor]]:
        bounds = range(0, vocabulary, rows)
        return [(slice(begin, begin + rows), output.matrix.detach()[begin : begin + rows]) for begin in bounds]

    logits = torch.cat([states @ piece.to(wide).T for _, piece in pieces()], 1)
    logits, slope = _made(logits, output, output.bias)
    shares = torch.softmax(logits, -1)
    weighted = torch.zeros_like(states)
    mean = torch.zeros_like(states)
    if not isinstance(slope, torch.Tensor):
        known = mean_of(output.matrix) if output.mean is None else output.mean
        mean = output.scale * known.to(wide)
    for where, piece in pieces():
        rows_of = piece.to(wide)
        if isinstance(slope, torch.Tensor):
            weighted += (shares[:, where] * slope[:, where]) @ rows_of
            mean += slope[:, where] @ rows_of / vocabulary
        else:
            weighted += output.scale * (shares[:, where] @ rows_of)
    pull, own = _pull(hidden, output, targets)
    losses = torch.logsumexp(logits, -1).to(torch.float64) - own
    return weighted.to(torch.float64) - pull, pull - mean.to(torch.float64), losses


def _pull(hidden: torch.Tensor, output: Output, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """J^T onehot(target) [positions, hidden], and the target's logit [positions]."""
    matrix = output.matrix.detach()[targets].to(torch.float64)
    logits = (hidden.detach().to(torch.float64) * matrix).sum(-1)
    logits, slope = _made(logits, output, None if output.bias is None else output.bias[targets])
    return matrix * (slope if isinstance(slope, float) else slope[:, None]), logits


def _made(logits: torch.Tensor, output: Output, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Logits of what the matrix gives, and their slope: d logits / d what the matrix gives."""
    if bias is not None:
        logits = logits + bias.detach().to(logits.dtype)
    logits = logits * output.scale
    if output.cap is None:
        return logits, output.scale
    capped = torch.tanh(logits / output.cap)
    return capped * output.cap, (1 - capped * capped) * output.scale


def _over(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """The ratio, 0 where it has no meaning."""
    return torch.where(below != 0, above / torch.where(below != 0, below, 1.0), 0.0)
