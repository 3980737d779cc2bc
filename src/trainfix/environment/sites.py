"""Another environment than this interpreter's: where its packages lie, told from files alone.

What an interpreter would do is in CPython's ``Lib/site.py`` and ``Modules/getpath.py`` (3.10 to 3.13). Nothing is
executed or imported: lines of ``.pth`` files that begin with ``import`` are passed over. The user's own
site-packages (``~/.local``) are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from trainfix.environment.printable import printable

_SMALL = 1024 * 1024  # no .pth file or pyvenv.cfg is larger
_WHAT = "a virtual environment, a conda environment, a site-packages folder, or an interpreter such as bin/python"


class SiteError(Exception):
    """No environment is where the user says. The message names what was looked for, where, and what is near."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Site:
    """One environment: the folders that hold its packages, in the order of its ``sys.path``, and its Python's version
    as far as files tell it (``3.11.7``, ``3.11`` or None)."""

    paths: tuple[str, ...]
    python: str | None


def site(where: str) -> Site:
    """The environment at `where`: a virtual or conda environment, a site-packages folder, or an interpreter's path.

    Raises SiteError.
    """
    path = Path(os.path.abspath(where))
    try:
        if path.is_file():
            prefix, python = _of_interpreter(path)
            return _of_prefix(prefix, python)
        if not path.is_dir():
            raise SiteError(f"{where}: no such folder or interpreter{_near(path)}; name {_WHAT}")
        if _is_prefix(path):
            return _of_prefix(path)
        if _holds_packages(path):
            return Site(_with_pth([path]), _python_above(path))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SiteError(f"cannot look into {where}: {why}; make it readable, or name {_WHAT}") from None
    looked = "no pyvenv.cfg, conda-meta, lib/python*/site-packages or *.dist-info in it"
    raise SiteError(f"{where} is not a Python environment: there is {looked}{_near(path)}; name {_WHAT}")


def _of_interpreter(path: Path) -> tuple[Path, str | None]:
    """The prefix of an interpreter and the version in its name. As Python itself does, a pyvenv.cfg beside a link wins
    over what the link leads to."""
    seen = [path]
    while seen[-1].is_symlink() and len(seen) < 40:
        target = seen[-1].readlink()
        seen.append(Path(os.path.normpath(seen[-1].parent / target)))
    if not re.match(r"(python|pypy)[\d.]*$", path.name):
        raise SiteError(f"{path} is a file, but not named like an interpreter; name {_WHAT}")
    versions = [named[1] for one in seen if (named := re.fullmatch(r"python(\d+\.\d+)", one.name))]
    python = versions[-1] if versions else None
    for one in seen:
        for prefix in (one.parent, one.parent.parent):
            if (prefix / "pyvenv.cfg").is_file():
                return prefix, None
    prefix = Path(os.path.realpath(path)).parent.parent
    if not _folders(prefix, python):
        looked = prefix / "lib" / f"python{python or '*'}" / "site-packages"
        raise SiteError(f"{path} leads to no packages: there is no {looked}{_shim(path)}; name {_WHAT}")
    return prefix, python


def _shim(path: Path) -> str:
    return " (is it a shim of pyenv? `pyenv which python` tells the real one)" if path.parent.name == "shims" else ""


def _is_prefix(path: Path) -> bool:
    return (path / "pyvenv.cfg").is_file() or (path / "conda-meta").is_dir() or bool(_folders(path))


def _of_prefix(prefix: Path, python: str | None = None) -> Site:
    config = _pyvenv(prefix)
    version = config.get("version_info") or config.get("version") or _conda_python(prefix) or python or ""
    number = re.match(r"\d+\.\d+(\.\d+)?", version)
    version = number[0] if number else ""
    minor = ".".join(version.split(".")[:2]) or None
    folders = _folders(prefix, minor) or _folders(prefix)
    if not folders:
        looked = prefix / "lib" / f"python{minor or '*'}" / "site-packages"
        raise SiteError(f"{prefix} is an environment without packages: there is no {looked}; create it anew")
    found = {_version_in(folder) for folder in folders} - {None}
    if len(found) > 1:
        listed = ", ".join(str(folder) for folder in folders)
        raise SiteError(f"{prefix} has packages for several versions of Python: name one folder of {listed}")
    if minor not in found:
        version = next(iter(found), None) or version
    if config.get("include-system-site-packages", "").lower() == "true":
        folders += [folder for folder in _base_folders(prefix, config, minor) if folder not in folders]
    return Site(_with_pth(folders), version or None)


def _pyvenv(prefix: Path) -> Mapping[str, str]:
    """The keys and values of pyvenv.cfg; none if there is none."""
    text = _small_text(prefix / "pyvenv.cfg")
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip().lower(): value.strip() for key, equals, value in pairs if equals}


def _conda_python(prefix: Path) -> str | None:
    """The version of a conda environment's Python, from the name of its record."""
    records = prefix / "conda-meta"
    names = sorted(os.listdir(records)) if records.is_dir() else []
    found = [named[1] for name in names if (named := re.match(r"python-(\d+\.\d+\.\d+)[^-]*-[^-]+\.json$", name))]
    return found[0] if found else None


def _base_folders(prefix: Path, config: Mapping[str, str], python: str | None) -> list[Path]:
    """The folders of the interpreter that a virtual environment shares its packages with."""
    home = Path(config.get("base-executable") or Path(config.get("home", ""), f"python{python or '3'}"))
    bases = [Path(config["base-prefix"])] if config.get("base-prefix") else []
    bases += [home.parent.parent, Path(os.path.realpath(home)).parent.parent]
    for base in bases:
        if base.is_absolute() and (found := _folders(base, python)):
            return found
    raise SiteError(
        f"{prefix / 'pyvenv.cfg'} says include-system-site-packages = true, but there are no packages of "
        f"Python {python or ''} at {bases[0]}: name the site-packages folder itself to leave them out"
    )


def _folders(prefix: Path, python: str | None = None) -> list[Path]:
    """The site-packages folders below a prefix, for one version (3.11) or all. Debian's are called dist-packages."""
    version = re.escape(python) if python else r"3\.\d+"
    found: list[Path] = []
    for lib in (prefix / "local" / "lib", prefix / "lib", prefix / "lib64"):
        names = sorted(os.listdir(lib)) if lib.is_dir() else []
        for name in names:
            if re.fullmatch(rf"(python|pypy){version}t?", name) or (name == "python3" and lib.parent == prefix):
                found += [lib / name / leaf for leaf in ("site-packages", "dist-packages")]
    there: dict[str, Path] = {}
    for folder in found:
        if folder.is_dir():
            there.setdefault(os.path.realpath(folder), folder)
    folders = list(there.values())
    return folders if any(map(_version_in, folders)) else []


def _version_in(folder: Path) -> str | None:
    named = re.fullmatch(r"(?:python|pypy)(\d+\.\d+)t?", folder.parent.name)
    return named[1] if named else None


def _holds_packages(folder: Path) -> bool:
    """Whether a folder is a site-packages folder itself, by its name or by the metadata in it."""
    if folder.name in ("site-packages", "dist-packages"):
        return True
    return any(name.endswith((".dist-info", ".egg-info")) for name in os.listdir(folder))


def _python_above(folder: Path) -> str | None:
    """The version of the Python that a site-packages folder belongs to."""
    minor = _version_in(folder)
    if minor is None:
        return None
    prefix = folder.parent.parent.parent
    config = _pyvenv(prefix)
    full = config.get("version_info") or config.get("version") or _conda_python(prefix) or ""
    number = re.match(r"\d+\.\d+\.\d+", full)
    return number[0] if number and number[0].startswith(f"{minor}.") else minor


def _with_pth(folders: list[Path]) -> tuple[str, ...]:
    """Each folder, then what its ``.pth`` files add as plain paths: existing folders, each once."""
    found: dict[str, str] = {}
    for folder in folders:
        found.setdefault(os.path.realpath(folder), str(folder))
        for added in _added(folder):
            found.setdefault(os.path.realpath(added), added)
    return tuple(found.values())


def _added(folder: Path) -> Iterator[str]:
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".pth") or name.startswith("."):
            continue
        for line in _small_text(folder / name).splitlines():
            if not line.strip() or line.startswith(("#", "import ", "import\t")) or "\0" in line:
                continue
            added = os.path.normpath(os.path.join(folder, line.rstrip()))
            if os.path.isdir(added):
                yield added


def _small_text(file: Path) -> str:
    """The text of a small file; empty if it is none, or cannot be read."""
    try:
        if not file.is_file() or file.stat().st_size > _SMALL:
            return ""
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError:
        return ""


def _near(path: Path) -> str:
    """What the user may have meant: an environment in that folder or above it, or a name like it."""
    try:
        if path.is_dir():
            within = [path / name for name in (".venv", "venv", "env", *sorted(os.listdir(path))[:100])]
            above = [path.parent, path.parent.parent]
            near = [one for one in (*within, *above) if one.is_dir() and _is_prefix(one)]
        else:
            names = get_close_matches(path.name, os.listdir(path.parent), 1)
            near = [path.parent / name for name in names]
    except (OSError, ValueError):
        return ""
    return f"; did you mean {near[0]}?" if near else ""
