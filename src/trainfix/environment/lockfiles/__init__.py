"""Environments that are not here: the exact versions in a lock file, for verdicts by version only.

Read are requirements files and the output of `pip freeze`, uv.lock, poetry.lock and pylock.toml. Nothing is resolved,
downloaded or expanded from the environment.
"""

from __future__ import annotations

import re

from trainfix.environment.blockers import Demand
from trainfix.environment.lockfiles import requirements, tables
from trainfix.environment.lockfiles.lock import Lock, LockError, locked, possible
from trainfix.environment.lockfiles.text import text_of
from trainfix.environment.names import normal

__all__ = ["Lock", "LockError", "demands", "read"]


def read(path: str) -> Lock:
    """The lock file `path`; its kind is told by its content and name. Raises LockError."""
    text = text_of(path)
    if text.lstrip().startswith("{"):
        advice = "`pipenv requirements` makes a requirements file of Pipfile.lock"
        raise LockError(f"{path} is JSON, which doctor does not read as a lock file; {advice}")
    if tables.is_tables(path, text):
        return tables.lock_of(path, text)
    return locked(path, "requirements", requirements.entries(path, text))


def demands(lock: Lock, package: str) -> tuple[Demand, ...]:
    """Every requirement on `package` that the lock file keeps and that applies on Linux.

    poetry.lock keeps them for every package, uv.lock for the projects themselves, the others for none.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    found: list[Demand] = []
    for by, text in lock.wants.get(normal(package), ()):
        try:
            requirement = Requirement(text)
        except (InvalidRequirement, RecursionError):
            continue  # poetry's own ^1.2, which it writes for local projects alone
        marker = str(requirement.marker or "")
        if possible(marker, lock.python):
            found.append(Demand(by, requirement, "requires"))
        elif any(possible(marker, lock.python, extra) for extra in _extras(marker)):
            found.append(Demand(by, requirement, "extra"))
    return tuple(found)


def _extras(marker: str) -> list[str]:
    """The extras that a marker names."""
    return re.findall(r"extra == [\"']([^\"']+)[\"']", marker)
