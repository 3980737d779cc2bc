"""Proof of TF-0411: two ranks without accumulation, whose gradients are never averaged.

All answers have the same length, so the ranks' means are right, and what is seen is the reduction alone.
"""

from __future__ import annotations

from . import token_experiment


def main() -> None:
    token_experiment.run(
        lambda: token_experiment.train_with_transformers(steps=1, rows=4, lengths=[5]),
        packages=["transformers"],
        ranks=2,
    )
