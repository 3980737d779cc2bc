"""Token weights seen from outside: from the gradient that reaches the hidden state in front of the output matrix.

Let h be a position's hidden state, W the output matrix and y the next token. A token-weighted cross-entropy, however it
is computed (fused, chunked, compiled), sends back to h

    w * J^T (softmax(z) - onehot(y)),    z = logits(h) = cap(scale * (W h + b)),    J = dz / dh

so the weight w is the projection of the gradient on that direction, and what is left over says whether the loss is a
plain next-token loss at all. Only the model's inputs are needed for y, never the framework's labels.
Plain torch arithmetic in float64; nothing of trainfix is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Output:
    """How logits are made of hidden states.

    matrix: [vocabulary, hidden]. bias: [vocabulary] or None. scale: what logits are multiplied with (Granite divides by
    its logits_scaling, Cohere multiplies with its logit_scale). cap: c of c * tanh(z / c) (Gemma's
    final_logit_softcapping), None where there is none.
    """

    matrix: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class TokenFit:
    """What the gradient at each position says, float64 [positions].

    weights: with which weight the token entered the loss; 0 where no gradient arrived.
    residuals: the part of the gradient that no weight of this token explains, relative to the gradient; 0 = explained.
    """

    weights: torch.Tensor
    residuals: torch.Tensor


def fit(hidden: torch.Tensor, gradient: torch.Tensor, output: Output, targets: torch.Tensor) -> TokenFit:
    """Explain `gradient` at `hidden`, both [positions, hidden], by the loss of `targets`, int [positions].

    Raises ValueError, naming the shapes, when they do not fit together.
    """
    if hidden.dim() != 2 or gradient.shape != hidden.shape or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden and gradient must be [positions, hidden] and targets [positions], not {list(hidden.shape)}, "
            f"{list(gradient.shape)} and {list(targets.shape)}"
        )
    if output.matrix.dim() != 2 or output.matrix.shape[1] != hidden.shape[1]:
        raise ValueError(f"the output matrix must be [vocabulary, {hidden.shape[1]}], not {list(output.matrix.shape)}")
    got = gradient.detach().to(torch.float64)
    direction = directions(hidden, output, targets)
    square = (direction * direction).sum(-1)
    along = (got * direction).sum(-1)
    weights = torch.where(square > 0, along / torch.where(square > 0, square, 1.0), 0.0)
    left = torch.linalg.vector_norm(got - weights[:, None] * direction, dim=-1)
    size = torch.linalg.vector_norm(got, dim=-1)
    return TokenFit(weights, torch.where(size > 0, left / torch.where(size > 0, size, 1.0), 0.0))


def directions(hidden: torch.Tensor, output: Output, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of each target's cross-entropy at its hidden state, float64 [positions, hidden]."""
    matrix = output.matrix.detach().to(torch.float64)
    logits = hidden.detach().to(torch.float64) @ matrix.T
    if output.bias is not None:
        logits = logits + output.bias.detach().to(torch.float64)
    logits = logits * output.scale
    slope = torch.ones_like(logits)
    if output.cap is not None:
        capped = torch.tanh(logits / output.cap)
        logits, slope = capped * output.cap, 1 - capped * capped
    error = torch.softmax(logits, -1)
    error[torch.arange(len(targets), device=error.device), targets] -= 1
    return (error * slope * output.scale) @ matrix
