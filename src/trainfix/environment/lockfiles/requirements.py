"""pip's requirements format, which `pip freeze`, `uv export` and pip-compile write too.

What pip does with a line is in its ``_internal/req/req_file.py`` and ``constructors.py``; the comments that
``pip freeze`` writes before an editable install in ``_internal/operations/freeze.py`` (pip 23 to 26).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from trainfix.environment.lockfiles.lock import Entry, LockError
from trainfix.environment.lockfiles.text import LIMIT, logical_lines, shown, text_of, without_secrets
from trainfix.environment.names import normal, release, told_by_name

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# A requirement is shorter than this, its hashes apart.
LONGEST = 4096
MOST_FILES, MOST_PACKAGES = 100, 20_000
_ASKS = {"-r": True, "--requirement": True, "-c": False, "--constraint": False}
_FLAGS = (*_ASKS, "-e", "--editable")
_ARCHIVES = (".whl", ".tar.gz", ".zip", ".tgz", ".tar.bz2")
_NAMED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?) ?(?:\[[^\]]*\] ?)?(?=@|[=~!<>]=|<|>|;|\(|$)")
_FROZEN = re.compile(r"# Editable .*\(([A-Za-z0-9._-]+==[^ )]+)\)")
# What else people have at hand, by its first line, and what to do with it.
_OTHER_FORMATS = (
    (
        r"Package +Version\b|[\w.-]+ +\d[\w.+]*( |$)",
        "this looks like `pip list`; `pip freeze` writes what doctor reads",
    ),
    (r"[\w.-]+=[\w.]+(=\w+)?$", "this looks like `conda list --export`; run `pip freeze` in that environment"),
    (r"[\w.-]+ ?:( |$)", "this looks like YAML, such as a conda environment; run `pip freeze` in that environment"),
    (r"\[|[\w-]+ ?= ", "this looks like TOML; of TOML files doctor reads uv.lock, poetry.lock and pylock.toml"),
)


def entries(source: str, text: str) -> list[Entry]:
    """What the requirements file `source` says of each package, and the files that it includes (``-r``, ``-c``).

    Raises LockError.
    """
    found: list[Entry] = []
    seen = {(os.path.realpath(source), True)}
    waiting, left = [(source, text, True)], LIMIT - len(text)
    while waiting:
        file, text, asked = waiting.pop()
        for entry in _read(file, text):
            if isinstance(entry, Entry):
                found.append(replace(entry, asked=asked))
                if len(found) > MOST_PACKAGES:
                    raise LockError(f"{entry.place}: more than {MOST_PACKAGES} packages, which no environment has")
                continue
            line, included, asks = entry
            key = (os.path.realpath(included), asked and asks)
            if key in seen:
                continue
            seen.add(key)
            more = _included(included, f"{file}, line {line}")
            left -= len(more)
            if len(seen) > MOST_FILES or left < 0:
                raise LockError(f"{source} includes more than doctor reads: write one list with `pip freeze`")
            waiting.append((included, more, asked and asks))
    return found


def _included(path: str, place: str) -> str:
    try:
        return text_of(path)
    except LockError as error:
        raise LockError(f"{place} includes a file that cannot be read: {error}") from None


def _read(file: str, text: str) -> Iterator[Entry | tuple[int, str, bool]]:
    """The entries of one file, and its inclusions: (line, path, whether it asks for what it lists)."""
    frozen = ""
    for line, words in logical_lines(text):
        comment = _FROZEN.match(words)
        if words.startswith("#"):
            frozen = comment[1] if comment else frozen
            continue
        words = words.partition(" #")[0].strip()
        flag, value = _option(words)
        if flag in _ASKS:
            if "://" in value:
                raise LockError(f"{file}, line {line}: {shown(value)} is not on this machine: download it, and name it")
            yield line, os.path.join(os.path.dirname(file), value), _ASKS[flag]
        elif flag in _FLAGS:
            entry = _requirement(frozen, file, line) if frozen else _address(value, file, line, "an editable install")
            if entry is not None:
                yield entry
        elif not words.startswith("-"):
            entry = _line(words.partition(" -")[0].strip(), file, line)
            if entry is not None:
                yield entry
        frozen = ""


def _option(words: str) -> tuple[str, str]:
    """The option at the start of a line and its value, for those that name a file or a package."""
    for flag in _FLAGS:
        glued = not flag.startswith("--")
        if words.startswith((f"{flag} ", f"{flag}=")) or (glued and words.startswith(flag)):
            return flag, words[len(flag) :].lstrip(" =").strip("\"'")
    return "", ""


def _line(words: str, file: str, line: int) -> Entry | None:
    if len(words) > LONGEST:
        raise LockError(f"{file}, line {line}: too long for a requirement ({len(words)} characters); correct it there")
    target = words.partition("; ")[0].strip()
    head = target.partition("@")[0]
    if "://" in head or head.startswith((".", "/", "~", "file:")) or "\\" in head or _is_archive(target):
        return _address(words, file, line, "an address")
    if _NAMED.match(words):
        return _requirement(words, file, line)
    advice = next((advice for form, advice in _OTHER_FORMATS if re.match(form, words)), "correct it, or comment it out")
    raise LockError(f"{file}, line {line}: {shown(words)} is not a requirement; {advice}")


def _requirement(words: str, file: str, line: int) -> Entry:
    """A line that begins with a package's name. What no standard allows (``==2004d``) leaves the version open."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(words)
    except (InvalidRequirement, RecursionError):
        named = _NAMED.match(words)
        name = named[1] if named else words
        return Entry(
            normal(name), None, file, line, without_secrets(words), "not a requirement that the standard knows"
        )
    name, marker = normal(requirement.name), str(requirement.marker or "")
    says = without_secrets(words.partition(";")[0].strip())
    version, why = _version(requirement)
    return Entry(name, version, file, line, says, why, marker)


def _version(requirement: Requirement) -> tuple[str | None, str]:
    """The one version that a requirement admits, or why there is none."""
    if requirement.url is not None:
        told = told_by_name(requirement.url)
        return (told[1], "") if told else (None, "an address, which does not tell the version")
    exact = {one.version for one in requirement.specifier if one.operator in ("==", "===")}
    if not exact:
        return None, "a range, not a version" if requirement.specifier else "no version"
    if len(exact) > 1 or next(iter(exact)).endswith(".*"):
        return None, "a range, not a version"
    version = release(next(iter(exact)))
    return version, "" if version else "not a version that the standard knows"


def _address(value: str, file: str, line: int, what: str) -> Entry | None:
    """A path or URL instead of a name. None if it names no package, as ``-e .`` does."""
    target, _, marker = (part.strip() for part in value.partition("; "))
    address, _, fragment = target.partition("#")
    told = told_by_name(address)
    if told is not None:
        return Entry(told[0], told[1], file, line, marker=marker)
    egg = re.search(r"(?:^|&)egg=([A-Za-z0-9._-]+)", fragment)
    last = re.split(r"[/\\]", address.partition("?")[0].rstrip("/\\"))[-1]
    name = egg[1] if egg else last.partition("@")[0].partition("[")[0].removesuffix(".git")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) or (not egg and name.endswith(_ARCHIVES)):
        return None
    return Entry(
        normal(name), None, file, line, without_secrets(target), f"{what}, which does not tell the version", marker
    )


def _is_archive(target: str) -> bool:
    path = target.partition("#")[0]
    return path.endswith(_ARCHIVES) and not {"=", "@"} & set(path)
