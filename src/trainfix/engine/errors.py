"""The errors that users see."""

from __future__ import annotations


class UnfixedBugError(RuntimeError):
    """This run reaches a known silent training error that trainfix could not repair, so training would be wrong.

    The message names the advisory, why it is reached, and the three ways out. `advisory` holds the id.
    """

    def __init__(self, message: str, advisory: str = "") -> None:
        super().__init__(message)
        self.advisory = advisory


class UnbalancedError(RuntimeError):
    """The ledger was asked to stop a run that does not balance (TRAINFIX_LEDGER=action=stop), and this one does not."""


UnbalancedError.__module__ = "trainfix"
UnfixedBugError.__module__ = "trainfix"  # where users find it
