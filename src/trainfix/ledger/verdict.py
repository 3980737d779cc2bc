"""A finding in words: does the window balance, and if not, what is wrong where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainfix.ledger import absolute, words
from trainfix.ledger.audit import Finding
from trainfix.ledger.positions import positions
from trainfix.measure.evenness import Evenness, evenness

BALANCED, UNBALANCED, UNCLEAR = "balanced", "not balanced", "could not tell"


_LITTLE = 0.001  # of a gradient: what clipping seldom leaves


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
                if number in tokens.within:
                    row["sequence_weights"] = {str(one): weight for one, weight in tokens.within[number].items()}
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
    seen, flags = positions(found)
    tokens = evenness(seen) if len(seen.batch) else None
    if tokens is not None and tokens.verdict == "nothing":
        tokens = None
    problems: list[str] = []
    remarks: list[str] = []
    unclear = [found.incomplete] if found.incomplete else []
    if not found.incomplete and found.balance is not None:
        problems += words.of_balance(found, found.balance)
        if found.balance.verdict == "unclear" and not absolute.is_whole(found):
            unclear.append("the micro-batches are too alike to tell whether each is there once")
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
        more, notes = words.of_tokens(tokens, flags, found)
        problems += more
        remarks += notes
        scale = None if found.incomplete else absolute.scale(tokens, found, before)
        if scale is not None and absolute.is_off(scale, tokens):
            if absolute.is_sum(scale, tokens):
                remarks.append("the loss is the sum over all tokens, not their mean")
            else:
                problems.append(f"the gradient is {scale:.4g} times that of the mean loss per token")
        if scale == 1.0 and absolute.consumed(tokens, found) < _LITTLE:
            share = absolute.consumed(tokens, found)
            remarks.append(f"what is consumed is {share:.0e} of the mean loss's gradient: is it clipped that much?")
    elif found.unseen:
        remarks.append("token weights were not seen: a rank holds only a part of the output matrix")
    return Verdict(found, tokens, scale, tuple(problems), tuple(remarks), tuple(unclear))
