"""Token weights: the weight with which each trained token entered the loss, relative to the mean, 1 = right.

Plain arithmetic, and nothing of trainfix is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenWeights:
    """What a window's loss is made of.

    `weights`: one per micro-batch, that of each of its trained tokens relative to the mean over all tokens; nan for a
    micro-batch without trained tokens, which has no token to weigh.
    `scale`: the mean, 1 = right: 0.125 means that every token counts, on average, an eighth.
    """

    weights: tuple[float, ...]
    scale: float


def token_weights(coefficients: Sequence[float], tokens: Sequence[int]) -> TokenWeights:
    """Split micro-batch coefficients into the tokens' weights and a common scale.

    `coefficients[k]` is the weight of micro-batch k where 1 is the gradient of (the sum of its tokens' losses) / (all
    trained tokens of the window, over all ranks), `tokens[k]` its number of trained tokens.
    Raises ValueError when the lengths differ, a count is negative, or there are no tokens at all.
    """
    if len(coefficients) != len(tokens):
        raise ValueError(f"{len(coefficients)} coefficients and {len(tokens)} token counts: give one each")
    if any(count < 0 for count in tokens) or not sum(tokens):
        raise ValueError(f"the token counts must not be negative and not all be zero: {list(tokens)}")
    pairs = list(zip(coefficients, tokens, strict=True))
    scale = sum(coefficient * count for coefficient, count in pairs) / sum(tokens)
    missing = float("nan")
    return TokenWeights(tuple(c / scale if scale and count else missing for c, count in pairs), scale)
