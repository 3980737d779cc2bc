"""What a test does to a trainer of TRL before it trains: `prepare` of tests.support.trl_runs."""

from __future__ import annotations

import sys
from typing import Any


def reverted(trainer: Any, configuration: Any) -> None:
    """Take the repair of TF-0303 out."""
    trainfix: Any = sys.modules["trainfix"]
    assert trainfix.revert("TF-0303") == ("TF-0303",)


def applied(trainer: Any, configuration: Any) -> None:
    """And put it in place again."""
    trainfix: Any = sys.modules["trainfix"]
    (record,) = trainfix.apply("TF-0303")
    assert record.state == "applied"
