"""What the two runs of an experiment say: the findings of a record, and the exit code of all records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .interpreters import Outcome

_TOLERANCE = 1e-3  # how far a coefficient may be from right, at least


@dataclass(frozen=True)
class Applicability:
    """Whether the installed release has the error, as the catalogue says. None: the catalogue does not know."""

    package: str
    installed: str | None
    applicable: bool | None
    reason: str | None


def exit_code(records: Iterable[Mapping[str, Any]]) -> int:
    """0: every applicable error is gone with the fix. 1: one is not. 3: one could not be shown or run."""
    codes = [_exit_code(record) for record in records]
    return 1 if 1 in codes else 3 if 3 in codes else 0


def _exit_code(record: Mapping[str, Any]) -> int:
    if record["applicable"] is False:
        return 1 if record["reproduced"] else 0
    if not record["reproduced"]:
        return 3
    repaired: bool | None = record["repaired"]
    return 3 if repaired is None else int(not repaired)


def findings(advisory_id: str, found: Applicability, without: Outcome, with_fix: Outcome | None) -> dict[str, Any]:
    """What the two runs say: the keys of the record that they change."""
    if without.answer is None:
        return {"reason": f"the experiment could not be run: {without.problem}"}
    reproduced = not _is_right(without.answer)
    record: dict[str, Any] = {"before": _numbers(without.answer), "reproduced": reproduced}
    if with_fix is None:
        return record
    if found.applicable is None:
        record |= {"applicable": reproduced}
    if not reproduced:
        reason = found.reason or f"{found.package} {found.installed} is listed as affected"
        return record | {"reason": f"{reason}; the experiment does not show the error"}
    return record | _repair(advisory_id, with_fix)


def _repair(advisory_id: str, with_fix: Outcome) -> dict[str, Any]:
    """`repaired` and `after`, with the reason where the error is not gone, or gone for a reason that is not the fix."""
    if with_fix.answer is None:
        return {"repaired": None, "reason": f"the experiment with trainfix could not be run: {with_fix.problem}"}
    right = _is_right(with_fix.answer)
    status = next((one for one in with_fix.answer["status"] or () if one["id"] == advisory_id), None)
    state = "missing from trainfix.status()" if status is None else status["state"]
    detail = f" ({status['reason']})" if status is not None and status.get("reason") else ""
    result: dict[str, Any] = {"after": _numbers(with_fix.answer), "repaired": right and state == "applied"}
    if state != "applied":
        return result | {"reason": f"the fix was not applied: it is {state}{detail}"}
    return result | {"reason": None if right else "the fix is applied and the gradient is still wrong"}


def _numbers(answer: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: answer[key] for key in ("relative_error", "cosine", "norm_ratio")}
    return {"coefficients": [round(value, 6) + 0.0 for value in answer["current"]], **numbers}


def _is_right(answer: Mapping[str, Any]) -> bool:
    """All of this window's micro-batches, nothing of an earlier window, nothing else."""
    tolerance, current = max(_TOLERANCE, answer["tolerance"]), answer["current"]
    if any(abs(value) > tolerance for value in answer["earlier"]):
        return False
    if answer["not_this_error"]:
        pairs = zip(current, answer["not_this_error"], strict=True)
        if all(abs(value - wanted) <= tolerance for value, wanted in pairs):
            return True
    return all(abs(value - 1) <= tolerance for value in current) and answer["relative_error"] <= answer["tolerance"]
