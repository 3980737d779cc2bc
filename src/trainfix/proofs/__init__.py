"""Proofs: each shows one advisory on the installed packages, without and with the fix, in processes of its own.

Only the standard library is imported here; the experiments need torch and run in child interpreters.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .interpreters import ChildProblem, Interpreter, interpreters, search_path
from .judge import Applicability, exit_code, findings

__all__ = ["Applicability", "ChildProblem", "Progress", "applicability", "exit_code", "prove", "prove_all"]

_ONE_EXPERIMENT = 300.0  # seconds until it is given up
_SEVERITIES = ("gradient", "scale", "precision", "metric", "default")
# The experiment is two processes already.
TWO_RANKS = frozenset({"tf_0006", "tf_0007", "tf_0203", "tf_0301", "tf_0402", "tf_0411"})


class Progress(Protocol):
    """Told that the proof `number` of `total` begins, and, with its record, that it has ended."""

    def __call__(self, number: int, total: int, advisory_id: str, record: Mapping[str, Any] | None) -> None: ...


def prove(
    advisory_id: str,
    *,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    named: bool = True,
) -> dict[str, Any]:
    """`prove_all` of one advisory, `named` by the user or not: its record."""
    (record,) = prove_all([advisory_id], named=[advisory_id] if named else [], python=python, env=env)
    return record


def prove_all(
    ids: Sequence[str],
    *,
    named: Collection[str] = (),
    progress: Progress | None = None,
    seconds: float | None = None,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run the experiments of these advisories, and return their records (the keys of `trainfix prove --format json`)
    in the order of `ids`.

    At most two processes are busy at a time. The gravest and quickest run first; what has not run after `seconds` is
    not `reproduced`, and says so. `python` is the interpreter whose packages are examined, `env` its whole environment
    (default: this process's).
    Where the release is not affected, the run without the fix is made only if the advisory was `named` by the user, and
    `repaired` is None. Where the catalogue does not know the release, `applicable` is what the experiment says.
    `reproduced` is None, with a reason, where the experiment could not be run.
    Raises UnknownAdvisory, and ChildProblem where `python` does not start.
    """
    from .. import advisories

    wanted = [advisories.load(advisory_id) for advisory_id in ids]
    environment = dict(os.environ if env is None else env)
    deadline = None if seconds is None else time.monotonic() + seconds
    path = search_path(python, environment)
    found = {one.id: applicability(one, path) for one in wanted}
    records = {one.id: _record(one, found[one.id]) for one in wanted}
    todo = sorted((one for one in wanted if _is_to_run(one, found[one.id], one.id in named)), key=_order)
    tell = progress or _tell_nobody
    with interpreters(python, environment) as (without, repaired):
        for number, advisory in enumerate(todo, 1):
            begin, record = time.monotonic(), records[advisory.id]
            if deadline is not None and begin >= deadline:
                record |= {"reason": f"not run: {_over(advisory.id, seconds)}"}
            else:
                tell(number, len(todo), advisory.id, None)
                limits = _Limits(begin + _ONE_EXPERIMENT, f"no answer after {_ONE_EXPERIMENT:g} s")
                if deadline is not None and deadline < limits.deadline:
                    limits = _Limits(deadline, _over(advisory.id, seconds))
                record |= _experiment(advisory, found[advisory.id], without, repaired, limits)
                record |= {"seconds": round(time.monotonic() - begin, 1)}
            tell(number, len(todo), advisory.id, record)
    return [records[advisory_id] for advisory_id in ids]


def _tell_nobody(number: int, total: int, advisory_id: str, record: Mapping[str, Any] | None) -> None:
    pass


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


def _record(advisory: Any, found: Applicability) -> dict[str, Any]:
    """The record of an advisory whose experiment has not run."""
    nothing = f"trainfix has no experiment for {advisory.id}; trainfix show {advisory.id} tells what is known"
    return {
        "id": advisory.id,
        "package": found.package,
        "installed": found.installed,
        "applicable": found.applicable,
        "reproduced": None,
        "repaired": None,
        "reason": nothing if advisory.proof is None else found.reason,
        "before": None,
        "after": None,
        "seconds": 0.0,
    }


def _is_to_run(advisory: Any, found: Applicability, named: bool) -> bool:
    there = advisory.proof is not None and found.installed is not None
    return there and (found.applicable is not False or named)


def _order(advisory: Any) -> tuple[int, bool, str]:
    """The gravest first, and of these the quickest."""
    return (_SEVERITIES.index(advisory.severity), advisory.proof in TWO_RANKS, advisory.id)


def _over(advisory_id: str, seconds: float | None) -> str:
    return f"the {seconds:g} s for all proofs are over; run it alone with `trainfix prove {advisory_id}`"


@dataclass(frozen=True)
class _Limits:
    """Until when (of time.monotonic) an experiment may run, and what is said of one that does not end by then."""

    deadline: float
    overdue: str


def _experiment(
    advisory: Any, found: Applicability, without: Interpreter, repaired: Interpreter, limits: _Limits
) -> dict[str, Any]:
    """Both runs, and what follows: at the same time, or one after the other where each is two processes.

    A release that is known to be right gets the first only.
    """
    both = found.applicable is not False
    at_once = both and advisory.proof not in TWO_RANKS
    without.ask(advisory)
    if at_once:
        repaired.ask(advisory)
    before = without.answer(limits.deadline, limits.overdue)
    if both and not at_once:
        repaired.ask(advisory)
    after = repaired.answer(limits.deadline, limits.overdue) if both else None
    return findings(advisory.id, found, before, after)
