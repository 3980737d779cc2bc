"""What the tests of this folder ask of a result."""

from __future__ import annotations

from typing import Any

import pytest

Result = dict[str, Any]
Window = dict[str, Any]


def windows(result: Result) -> list[Window]:
    """The windows that were not skipped. Any failure of the child is a failure of the test."""
    assert result["error"] is None
    assert result["windows"]
    return [window for window in result["windows"] if not window["skipped"]]


def coefficients(window: Window) -> list[float]:
    """Against the gradients as they arrived on the owning rank; in stage 1 against plain autograd."""
    found: list[float] | None = window["captured"]["coefficients"]
    return window["coefficients"] if found is None else found


def assert_right(result: Result) -> None:
    """Every window is."""
    for window in windows(result):
        assert_window_right(window)


def assert_window_right(window: Window) -> None:
    """It has every micro-batch and nothing of earlier windows; its norm and `safe_get_full_grad` agree with it."""
    assert coefficients(window) == pytest.approx([1] * len(window["coefficients"]), abs=1e-3)
    assert window["captured"]["relative_error"] < 1e-6
    # Against plain autograd in float64, low precision allows no more than this.
    assert window["coefficients"] == pytest.approx([1] * len(window["coefficients"]), abs=2e-2)
    assert window["relative_error"] < 1e-2
    assert window["earlier"] == pytest.approx([0] * len(window["earlier"]), abs=2e-2)
    norm, safe = window["global_norm_ratio"], window["safe_norm_ratio"]
    if norm is not None:  # in stage 0 with fp32 the engine knows none
        assert norm == pytest.approx(1, abs=5e-3)
    if safe is not None:
        assert safe == pytest.approx(window["norm_ratio"] if norm is None else norm, rel=1e-5)


def assert_loses(result: Result, expected: list[int]) -> None:
    """Every window has these coefficients (within low precision), and is far from right."""
    for window in windows(result):
        assert_window_loses(window, expected)


def assert_window_loses(window: Window, expected: list[int]) -> None:
    assert coefficients(window) == pytest.approx(expected, abs=2e-2)
    assert window["captured"]["relative_error"] > 0.1


def assert_same_bits(one: Result, other: Result) -> None:
    """Consumed gradients and parameters, bit for bit."""
    assert [window["sha256"] for window in windows(one)] == [window["sha256"] for window in windows(other)]
    assert one["parameters"] == other["parameters"]


def states(result: Result) -> dict[str, str]:
    """`trainfix.status()` as it was at the end: advisory -> state."""
    return {record["id"]: record["state"] for record in result["status"]}
