"""What a lock file says: the exact versions, and the packages of which it tells none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from textwrap import shorten
from types import MappingProxyType
from typing import Literal

from trainfix.environment.printable import printable

Kind = Literal["requirements", "uv", "poetry", "pylock"]
Wants = Mapping[str, tuple[tuple[str, str], ...]]


class LockError(Exception):
    """A lock file cannot be read. The message names the file, the line where there is one, and the next step."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Lock:
    """One lock file. `source` is the file as the user typed it; names are normalised (``flash-attn``).

    `packages` has the exact versions, `open` why none is known for the others. `files` and `lines` say where each
    stands (`files` differs from `source` after ``-r``; a line may be missing). `python` is what the file requires of
    Python. `wants`: package -> (who, requirement as text), as far as the file tells.
    """

    source: str
    kind: Kind
    packages: Mapping[str, str]
    open: Mapping[str, str]
    python: str | None
    files: Mapping[str, str]
    lines: Mapping[str, int]
    wants: Wants = field(repr=False)


@dataclass(frozen=True)
class Entry:
    """What one line or table says of one package: a version, or `says`, its words, and `why` they tell no version.

    A constraint does not ask for the package (`asked` is false).
    """

    name: str
    version: str | None
    file: str
    line: int | None
    says: str = ""
    why: str = ""
    marker: str = ""
    asked: bool = True

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return self.file if self.line is None else f"{self.file}, line {self.line}"


def locked(
    source: str, kind: Kind, entries: Iterable[Entry], python: str | None = None, wants: Wants | None = None
) -> Lock:
    """The entries of a file as one Lock. Raises LockError if there are none."""
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    if not by_name:
        raise LockError(f"{source} names no package: write it with `pip freeze`, or name another lock file")
    packages: dict[str, str] = {}
    unknown: dict[str, str] = {}
    first: dict[str, Entry] = {}
    for name, those in by_name.items():
        here = [entry for entry in those if possible(entry.marker, python)]
        if not here:
            continue  # for other systems only
        deciding = _deciding(here)
        first[name] = deciding[0]
        if deciding[0].version is not None and len(deciding) == 1:
            packages[name] = deciding[0].version
        else:
            unknown[name] = printable(_why_open(deciding))
    return Lock(
        source=source,
        kind=kind,
        packages=MappingProxyType(packages),
        open=MappingProxyType(unknown),
        python=python,
        files=MappingProxyType({name: entry.file for name, entry in first.items()}),
        lines=MappingProxyType({name: entry.line for name, entry in first.items() if entry.line is not None}),
        wants=MappingProxyType(wants or {}),
    )


def _deciding(entries: list[Entry]) -> list[Entry]:
    """The entries that decide a package's version: one for each exact version, else the first.

    A constraint's version counts where something asks for the package.
    """
    from packaging.utils import canonicalize_version

    asking = [entry for entry in entries if entry.asked]
    exact = [entry for entry in asking if entry.version is not None]
    if asking and not exact:
        exact = [entry for entry in entries if entry.version is not None]
    if exact:
        return list({canonicalize_version(entry.version or ""): entry for entry in reversed(exact)}.values())[::-1]
    if asking:
        return asking[:1]
    constraint = entries[0]
    says = constraint.says or f"{constraint.name}=={constraint.version}"
    why = "a constraint only, which does not tell whether it is installed"
    return [Entry(constraint.name, None, constraint.file, constraint.line, says, why)]


def _why_open(entries: list[Entry]) -> str:
    if len(entries) == 1:
        return f"{entries[0].says} ({entries[0].place}): {entries[0].why}"
    versions = " or ".join(f"{entry.version}{_condition(entry)} ({entry.place})" for entry in entries)
    return f"{entries[0].name} {versions}: several versions, and the file does not tell which one was installed"


def _condition(entry: Entry) -> str:
    return f" if {shorten(entry.marker, 60, placeholder=' ...')}" if entry.marker else ""


@lru_cache(maxsize=4096)
def possible(marker: str, python: str | None = None, extra: str = "") -> bool:
    """Whether an environment marker can hold on Linux, where these packages train, with CPython 3.8 to 3.14.

    `python` narrows the versions (a specifier such as ``>=3.10``). A marker that cannot be read may hold.
    """
    from packaging.markers import Marker

    if not marker:
        return True
    try:
        parsed = Marker(marker)
        return any(parsed.evaluate({**values, "extra": extra}) for values in _environments(python))
    except (ValueError, LookupError, RecursionError):
        return True


def _environments(python: str | None) -> Iterator[dict[str, str]]:
    for minor, patch, machine in product(range(8, 15), (0, 99), ("x86_64", "aarch64")):
        full = f"3.{minor}.{patch}"
        if _admits(python, full):
            yield {
                "implementation_name": "cpython",
                "implementation_version": full,
                "os_name": "posix",
                "platform_machine": machine,
                "platform_python_implementation": "CPython",
                "platform_system": "Linux",
                "python_full_version": full,
                "python_version": f"3.{minor}",
                "sys_platform": "linux",
            }


@lru_cache(maxsize=1024)
def _admits(python: str | None, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    try:
        return SpecifierSet(python or "").contains(version)
    except ValueError:
        return True  # poetry's ^3.10, for one
