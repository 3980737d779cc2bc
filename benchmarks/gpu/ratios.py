"""Ratios of two ways that were measured in turns, and how sure they are. Plain numbers, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.timing import interval_of_the_median


class Ratio(NamedTuple):
    """The median of the turns' ratios, and the 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of ours[i] / theirs[i], taken in the same turn i. Raises ValueError where the turns differ, or there are none."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} turns of one way cannot be paired with {len(theirs)} of the other")
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ratios), *interval_of_the_median(ratios))
