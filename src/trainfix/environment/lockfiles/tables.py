"""The lock files that are TOML: uv.lock, poetry.lock and pylock.toml (PEP 751).

Their formats: uv's ``crates/uv-resolver/src/lock`` (version 1), poetry's ``packages/locker.py`` (lock-version 1.0 to
2.1), PEP 751 (lock-version 1.0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from trainfix.environment import toml
from trainfix.environment.lockfiles.lock import Entry, Kind, Lock, LockError, Wants, locked
from trainfix.environment.lockfiles.text import shown
from trainfix.environment.names import normal, release, told_by_name

Table = Mapping[str, Any]
_HEADER = re.compile(r"(?m)^[ \t]*\[\[packages?\]\]")
_FILES = ("uv.lock", "poetry.lock")


def is_tables(source: str, text: str) -> bool:
    """Whether the file is TOML, by its content or, where that does not tell, its name."""
    name = re.split(r"[/\\]", source)[-1].lower()
    return name in _FILES or name.endswith(".toml") or _HEADER.search(text) is not None


def lock_of(source: str, text: str) -> Lock:
    """The lock file `source`. Raises LockError."""
    data = _parsed(source, text)
    kind = _kind(source, data)
    tables = data["packages" if kind == "pylock" else "package"]
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise LockError(f"{source}: its packages are not a list of tables; write it again")
    lines = _lines(text)
    entry, python, wants = _READERS[kind]
    entries = [entry(table, source, _take(lines, table)) for table in map(_named(source), tables)]
    return locked(source, kind, entries, python(data), wants(tables))


def _parsed(source: str, text: str) -> dict[str, Any]:
    try:
        return toml.loads(text)
    except toml.TomlProblem as error:
        raise LockError(f"{source}: {error}") from None


def _kind(source: str, data: Table) -> Kind:
    if "packages" in data and "lock-version" in data:
        return "pylock"
    metadata = data.get("metadata")
    if "package" in data and isinstance(metadata, dict) and "content-hash" in metadata:
        return "poetry"
    if "package" in data and isinstance(data.get("version"), int):
        return "uv"
    if "project" in data or "tool" in data:
        raise LockError(f"{source} says what is wanted, not what was chosen: name uv.lock, poetry.lock or pylock.toml")
    keys = f" (its keys: {', '.join(map(shown, list(data)[:5]))})" if data else ""
    raise LockError(f"{source} is none of uv.lock, poetry.lock and pylock.toml{keys}; `pip freeze` writes a list too")


def _named(source: str) -> Callable[[Table], Table]:
    def checked(table: Table) -> Table:
        name = table.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
            raise LockError(f"{source}: a package has the name {shown(str(name))}: it is damaged; write it again")
        return table

    return checked


def _lines(text: str) -> dict[str, list[int]]:
    """Name -> the lines of its tables, in order: TOML readers tell none."""
    found: dict[str, list[int]] = {}
    inside = False
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            inside = stripped in ("[[package]]", "[[packages]]")
        elif inside and (named := re.match(r"name *= *[\"']([A-Za-z0-9._-]+)[\"']", stripped)):
            found.setdefault(normal(named[1]), []).append(number)
            inside = False
    return found


def _take(lines: dict[str, list[int]], table: Table) -> int | None:
    those = lines.get(normal(table["name"]))
    return those.pop(0) if those else None


def _entry(table: Table, file: str, line: int | None, elsewhere: str, marker: str) -> Entry:
    """`elsewhere`: where the code comes from, if that is no release."""
    name, given = normal(table["name"]), table.get("version")
    version = release(given) if isinstance(given, str) else None
    if elsewhere:
        says = f"{name} {version}" if version else name
        return Entry(name, None, file, line, says, f"from {elsewhere}, whose code need not be a release's", marker)
    if version is None:
        says = name if given is None else f"{name} {shown(str(given))}"
        why = "no version" if given is None else "not a version that the standard knows"
        return Entry(name, None, file, line, says, why, marker)
    return Entry(name, version, file, line, marker=marker)


def _uv_entry(table: Table, file: str, line: int | None) -> Entry:
    source = _table(table.get("source"))
    local = next((key for key in ("editable", "virtual", "directory") if key in source), None)
    elsewhere = "a git repository" if "git" in source else "a folder of the user's" if local else ""
    return _entry(table, file, line, elsewhere, _any_of(table.get("resolution-markers")))


def _poetry_entry(table: Table, file: str, line: int | None) -> Entry:
    where = {"git": "a git repository", "directory": "a folder of the user's"}
    elsewhere = where.get(str(_table(table.get("source")).get("type")), "")
    markers = table.get("markers")
    return _entry(table, file, line, elsewhere, _any_of(list(_table(markers).values()) or [markers]))


def _pylock_entry(table: Table, file: str, line: int | None) -> Entry:
    elsewhere = "a repository" if "vcs" in table else "a folder of the user's" if "directory" in table else ""
    archive = _table(table.get("archive"))
    told = told_by_name(str(archive.get("url") or archive.get("path") or ""))
    if told is not None and "version" not in table:
        table = {**table, "version": told[1]}
    return _entry(table, file, line, elsewhere, _any_of([table.get("marker")]))


def _any_of(markers: object) -> str:
    """One marker that holds where any of `markers` does; empty if there is none, or one that is no text."""
    those = markers if isinstance(markers, list) else []
    if not all(isinstance(one, str) and one for one in those):
        return ""
    return those[0] if len(those) == 1 else " or ".join(f"({one})" for one in those)


def _all_of(markers: list[str | None]) -> str:
    """The end of a requirement that holds where all of `markers` do."""
    those = [one for one in markers if one]
    return f" ; {' and '.join(f'({one})' for one in those)}" if those else ""


def _requires_python(data: Table) -> str | None:
    return _text(data.get("requires-python"))


def _poetry_python(data: Table) -> str | None:
    python = _text(_table(data.get("metadata")).get("python-versions"))
    return None if python == "*" else python


def _uv_wants(tables: list[Table]) -> Wants:
    """What the projects in the lock require by their own metadata; uv keeps no other package's."""
    found: dict[str, list[tuple[str, str]]] = {}
    for table in tables:
        metadata = _table(table.get("metadata"))
        groups = _table(metadata.get("requires-dev"))
        wanted: list[tuple[Any, str | None]] = [(one, None) for one in _list(metadata.get("requires-dist"))]
        wanted += [(one, f"extra == '{group}'") for group, those in groups.items() for one in _list(those)]
        for one, group in wanted:
            name = _text(_table(one).get("name"))
            if name is not None:
                marker = _all_of([_text(one.get("marker")), group])
                found.setdefault(normal(name), []).append(
                    (_by(table), f"{name}{_text(one.get('specifier')) or ''}{marker}")
                )
    return {name: tuple(those) for name, those in found.items()}


def _poetry_wants(tables: list[Table]) -> Wants:
    found: dict[str, list[tuple[str, str]]] = {}
    for table in tables:
        for name, wanted in _table(table.get("dependencies")).items():
            for one in _list(wanted) or [wanted]:
                specifier = _poetry_specifier(_text(_table(one).get("version") if isinstance(one, dict) else one))
                marker = _all_of([_text(_table(one).get("markers"))])
                found.setdefault(normal(name), []).append((_by(table), f"{name}{specifier}{marker}"))
    return {name: tuple(those) for name, those in found.items()}


def _poetry_specifier(written: str | None) -> str:
    """Poetry's words as a standard specifier. A union (``>=1,<2 || >2,<4``, its form of !=) becomes its whole span."""
    if written is None or written == "*":
        return ""
    parts = [[one.strip() for one in part.split(",")] for part in written.split("||")]
    if len(parts) > 1:
        clauses = [one for one in parts[0] if one.startswith(">")] + [one for one in parts[-1] if one.startswith("<")]
    else:
        clauses = [f"=={one}" if one[:1].isdigit() else one for one in parts[0]]
    return ",".join(clauses)


def _by(table: Table) -> str:
    version = _text(table.get("version"))
    return f"{table['name']} {version}" if version else str(table["name"])


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


_Reader = tuple[
    Callable[[Table, str, "int | None"], Entry], Callable[[Table], "str | None"], Callable[["list[Table]"], Wants]
]
_READERS: Mapping[Kind, _Reader] = {
    "uv": (_uv_entry, _requires_python, _uv_wants),
    "poetry": (_poetry_entry, _poetry_python, _poetry_wants),
    "pylock": (_pylock_entry, _requires_python, lambda tables: {}),
}
