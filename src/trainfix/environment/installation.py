"""What doctor judges: the packages of this interpreter, of another environment, or their versions in a file."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainfix.environment import blockers
from trainfix.environment.blockers import Demand
from trainfix.environment.installed import Distribution, find

if TYPE_CHECKING:
    from trainfix.environment.lockfiles import Lock


@dataclass(frozen=True)
class Installation:
    """The packages of one environment.

    paths: the folders that hold them; None where nothing but versions is known. source: what the user named it by, None
    for this interpreter. python: its version, as far as it is known. versions, open: of packages that are not here, the
    exact version, or why none is known. repaired: advisories that were repaired in the run, as its checkpoint says.
    lock: the file that the versions are from.
    """

    paths: tuple[str, ...] | None
    source: str | None = None
    python: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    open: Mapping[str, str] = field(default_factory=dict)
    repaired: frozenset[str] = frozenset()
    lock: Lock | None = field(default=None, repr=False)

    @property
    def by_version(self) -> bool:
        """Whether only versions are known, and no code can be looked at."""
        return self.paths is None

    def copies(self, names: Iterable[str]) -> dict[str, list[Distribution]]:
        """Every installed copy of these packages; none where nothing but versions is known."""
        return {name: [] if self.paths is None else find(name, self.paths) for name in names}

    def demands(self, package: str) -> tuple[Demand, ...]:
        """What the other packages demand of `package`."""
        if self.paths is not None:
            return blockers.demands(package, self.paths)
        by_table = blockers.demands_of(package, self.versions)
        if self.lock is None:
            return by_table
        from trainfix.environment import lockfiles

        return (*lockfiles.demands(self.lock, package), *by_table)


def here() -> Installation:
    """This interpreter's own packages."""
    return Installation(tuple(sys.path), python=platform.python_version())


def at_site(where: str) -> Installation:
    """The packages of another environment on this machine. Raises SiteError."""
    from trainfix.environment import sites

    found = sites.site(where)
    return Installation(found.paths, where, found.python)


def of_lock(path: str) -> Installation:
    """The versions in a lock file. Raises LockError."""
    from trainfix.environment import lockfiles

    lock = lockfiles.read(path)
    return Installation(None, path, lock.python, versions=lock.packages, open=lock.open, lock=lock)


def of_checkpoint(folder: str) -> tuple[Installation | None, str]:
    """The versions that a checkpoint was saved with, and what was repaired then, with a person's words for it; None
    where the checkpoint has no stamp.

    Raises CheckpointError.
    """
    from trainfix.environment import checkpoints

    stamp = checkpoints.read(folder)
    if stamp.file is None:
        return None, stamp.meaning
    repaired = stamp.ids - frozenset(stamp.partly)
    return Installation(None, stamp.file, versions=stamp.packages, repaired=repaired), stamp.meaning
