"""Proofs: each shows one advisory on the installed packages, without and with the fix, in fresh interpreters.

Only the standard library is imported here; the experiments need torch and run in child interpreters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
_TIMEOUT = 300.0
_TOLERANCE = 1e-3  # how far a coefficient may be from right, at least

_WITHOUT_FIX = """
import importlib, sys, types
package = types.ModuleType("untouched")  # the experiment's modules, without trainfix's activating __init__
package.__path__ = [{package!r}]
sys.modules["untouched"] = package
importlib.import_module("untouched.proofs.{proof}").main()
"""

_WITH_FIX = """
import trainfix
trainfix.apply({id!r})  # a loss of precision is repaired only when it is asked for by name
import importlib
importlib.import_module("trainfix.proofs.{proof}").main()
"""


class ChildProblem(Exception):
    """The interpreter to examine cannot be started. The message names it."""


@dataclass(frozen=True)
class Applicability:
    """Whether the installed release has the error, as the catalogue says. None: the catalogue does not know."""

    package: str
    installed: str | None
    applicable: bool | None
    reason: str | None


@dataclass(frozen=True)
class _Outcome:
    """What a child answered, or why it did not."""

    answer: Mapping[str, Any] | None
    problem: str | None


def prove(
    advisory_id: str,
    *,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    named: bool = True,
) -> dict[str, Any]:
    """Run the experiment of one advisory and return its record (the keys of `trainfix prove --format json`).

    `python` is the interpreter whose packages are examined, `env` its whole environment (default: this process's).
    Where the release is not affected, the run without the fix is made only if the advisory was `named` by the user, and
    `repaired` is None. Where the catalogue does not know the release, `applicable` is what the experiment says.
    `reproduced` is None, with a reason, where the experiment could not be run.
    Raises UnknownAdvisory, and ChildProblem where `python` does not start.
    """
    from .. import advisories

    advisory = advisories.load(advisory_id)
    begin = time.monotonic()
    environment = dict(os.environ if env is None else env)
    found = applicability(advisory, _search_path(python, environment))
    record: dict[str, Any] = {
        "id": advisory_id,
        "package": found.package,
        "installed": found.installed,
        "applicable": found.applicable,
        "reproduced": None,
        "repaired": None,
        "reason": found.reason,
        "before": None,
        "after": None,
    }
    if advisory.proof is None:
        record["reason"] = (
            f"trainfix has no experiment for {advisory_id}; trainfix show {advisory_id} tells what is known"
        )
    elif found.installed is not None and (found.applicable is not False or named):
        record |= _experiment(advisory, found, python, environment)
    return record | {"seconds": round(time.monotonic() - begin, 1)}


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


def applicability(advisory: Any, search_path: list[str]) -> Applicability:
    """The catalogue's verdict on the copy of the package that an import along `search_path` would take."""
    from .. import advisories
    from ..environment import installed

    copies = installed.find(advisory.package, search_path)
    if not copies:
        return Applicability(advisory.package, None, False, f"{advisory.package} is not installed")
    copy = copies[0]
    versions = {name: found[0].version for name in advisory.needs if (found := installed.find(name, search_path))}
    versions[advisory.package] = copy.version
    verdict = advisories.judge(advisory, versions, installed.shapes_of(copy, advisory.evidence)).verdict
    known = {"affected": True, "unverified": None, "unknown": None}.get(verdict, False)
    unmet = advisories.unmet(advisory, versions)
    reason = None if known else f"{advisory.package} {copy.version} is {verdict}" + (f": {unmet}" if unmet else "")
    return Applicability(advisory.package, copy.version, known, reason)


def _experiment(advisory: Any, found: Applicability, python: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Both runs at the same time, and what follows. A release that is known to be right gets the first only."""
    proof = advisory.proof
    with ThreadPoolExecutor(max_workers=2) as pool:
        code = _WITHOUT_FIX.format(package=str(_PACKAGE), proof=proof)
        before = pool.submit(_child, python, code, environment, mode="off")
        after = None
        if found.applicable is not False:
            after = pool.submit(_child, python, _WITH_FIX.format(id=advisory.id, proof=proof), environment, mode="on")
    without = before.result()
    with_fix = None if after is None else after.result()
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
    return record | _repair(advisory.id, with_fix)


def _repair(advisory_id: str, with_fix: _Outcome) -> dict[str, Any]:
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


def _search_path(python: str, environment: Mapping[str, str]) -> list[str]:
    """sys.path of that interpreter. Raises ChildProblem where it cannot be started."""
    code = "import json, sys; print(json.dumps(sys.path))"
    try:
        answer = subprocess.run(
            [python, "-c", code], env=dict(environment), capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ChildProblem(f"cannot run {python}: {error}; name an interpreter that starts") from error
    path: list[str] = json.loads(answer.stdout.splitlines()[-1])
    return path


def _child(python: str, code: str, environment: Mapping[str, str], *, mode: str) -> _Outcome:
    """Run `code` in a fresh interpreter with trainfix `off` or `on`, free of the user's own settings of trainfix."""
    own = {key: value for key, value in environment.items() if not key.startswith("TRAINFIX")}
    own |= {"TRAINFIX": mode, "TRAINFIX_QUIET": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(
            [python, "-c", code], env=own, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return _Outcome(None, f"no answer after {_TIMEOUT:g} s")
    if child.returncode or not child.stdout.strip():
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()] or ["it printed nothing"]
        return _Outcome(None, f"the child ended with {child.returncode}: {lines[-1]}")
    return _Outcome(json.loads(child.stdout.splitlines()[-1]), None)
