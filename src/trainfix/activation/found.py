"""Whether interpreters of an environment start with trainfix active, told from files and variables alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from trainfix.activation import INSIDE

START_FILE = "trainfix_enable.pth"
WAITING = "_trainfix_waiting"
_LONGEST = 1 << 20  # bytes of a start-up file that are looked at


def active_in(paths: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """What activates an interpreter with these site-packages folders and variables: the command's words, or None.

    Settings such as TRAINFIX=off are not looked at.
    """
    if enabled_files(paths) and holds_trainfix(paths):
        return "trainfix enable"
    return "trainfix run" if bootstraps_in(environ) else None


def enabled_files(paths: Sequence[str]) -> list[str]:
    """The start-up files that ``trainfix enable`` wrote into these folders."""
    files = (os.path.join(path, START_FILE) for path in paths)
    return [file for file in files if any(WAITING in line for line in _lines(file) if _is_code(line))]


def bootstraps_in(environ: Mapping[str, str]) -> list[str]:
    """The bootstrap folders on PYTHONPATH, as ``trainfix run`` puts them there."""
    parts = environ.get("PYTHONPATH", "").split(os.pathsep)
    return [part for part in parts if part.endswith(INSIDE) and os.path.isfile(os.path.join(part, "sitecustomize.py"))]


def holds_trainfix(paths: Sequence[str]) -> bool:
    """Whether an interpreter with these site-packages folders finds trainfix, installed there or linked to (editable).

    Without it the start-up file does nothing.
    """
    folders = [folder for path in paths for folder in (path, *_linked(path))]
    return any(os.path.isfile(os.path.join(folder, INSIDE, f"{WAITING}.py")) for folder in folders)


def _linked(path: str) -> Iterator[str]:
    """The folders that the start-up files in a site-packages folder add to the path."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return
    for name in names:
        if name.endswith(".pth") and not name.startswith("."):
            lines = _lines(os.path.join(path, name))
            yield from (os.path.join(path, line) for line in lines if line and line[0] != "#" and not _is_code(line))


def _lines(file: str) -> list[str]:
    """The lines of a start-up file; none if it cannot be read."""
    try:
        if not os.path.isfile(file):
            return []
        with open(file, "rb") as opened:
            return [line.rstrip() for line in opened.read(_LONGEST).decode("utf-8-sig", "replace").splitlines()]
    except (OSError, ValueError):
        return []


def _is_code(line: str) -> bool:
    """Whether Python runs this line of a start-up file, and does not take it for a folder."""
    return line.startswith(("import ", "import\t"))
