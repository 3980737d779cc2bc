"""What the results of tests.support.trainer_runs say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

Result = Mapping[str, Any]


def windows(result: Result) -> list[Mapping[str, Any]]:
    """The windows of a training that ended well."""
    assert result["error"] is None, result["error"]
    assert result["windows"]
    return list(result["windows"])


def coefficients(result: Result) -> list[list[float]]:
    return [window["coefficients"] for window in windows(result)]


def assert_right(result: Result, *, norm: bool = True) -> None:
    """Every token of every window counted the same, and the log shows the true loss and the true norm."""
    for window in windows(result):
        weights = [one for one in window["weights"] if not math.isnan(one)]
        assert weights == pytest.approx([1.0] * len(weights), abs=1e-3)
        assert window["scale"] == pytest.approx(1.0, abs=1e-3)
        assert window["relative_error"] < 1e-4
    assert_logged(result, norm=norm)


def assert_logged(result: Result, *, loss: bool = True, norm: bool = True) -> None:
    """What a person sees is what an exact computation gives."""
    exact, shown = windows(result), [one for one in result["logs"] if "loss" in one]
    assert len(shown) == len(exact)
    if loss:
        assert [one["loss"] for one in shown] == pytest.approx([one["exact_loss"] for one in exact], abs=2e-4)
    if norm and "grad_norm" in shown[0]:  # some releases log it only where they clip
        assert [one["grad_norm"] for one in shown] == pytest.approx([one["exact_norm"] for one in exact], rel=1e-3)


def states(result: Result) -> dict[str, str]:
    return {one["id"]: one["state"] for one in result["status"]}
