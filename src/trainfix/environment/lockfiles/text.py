"""The text of a lock file, whatever it is that the user has named."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from difflib import get_close_matches

from trainfix.environment.lockfiles.lock import LockError

LIMIT = 32 * 1024 * 1024
_NEXT = "name a requirements file, uv.lock, poetry.lock or pylock.toml"
# What Windows' PowerShell writes for `pip freeze > requirements.txt`, and what its editors put before UTF-8.
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def text_of(path: str) -> str:
    """The text of the regular file `path`, at most LIMIT bytes. Raises LockError."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise LockError(f"{path} is not a regular file: write the list into a file, and name that")
            content = file.read(LIMIT + 1)
    except IsADirectoryError:
        raise LockError(f"{path} is a directory: name the lock file itself{_inside(path)}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise LockError(f"{path}: no such file{_beside(path)}; {_NEXT}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LockError(f"cannot read {path}: {why}; make it readable, or name another file") from None
    if len(content) > LIMIT:
        raise LockError(f"{path} is larger than {LIMIT // 2**20} MiB, which no lock file is: {_NEXT}")
    return _decoded(path, content)


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of every line that says something, as pip joins them: a backslash at the end
    goes on, except in a comment. Runs of blanks are one."""
    first, parts = 0, list[str]()
    for number, line in enumerate([*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""], 1):
        if not line and not parts:
            continue
        comment = line.lstrip().startswith("#")
        first = first or number
        if line.endswith("\\") and not comment:
            parts.append(line[:-1])
            continue
        joined = " ".join("".join(parts if comment and parts else [*parts, line]).split())
        if joined:
            yield first, joined
        first, parts = 0, []


def shown(words: str) -> str:
    """Words of a file as an error quotes them: short, no password."""
    words = without_secrets(words)
    return repr(words if len(words) <= 80 else words[:77] + "...")


def without_secrets(words: str) -> str:
    """Without what an address may hold of them: the user and password, the query."""
    return re.sub(r"\?[^#\s]*", "", re.sub(r"(?<=://)[^/@\s]*@", "", words))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes into would be waited for


def _decoded(path: str, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LockError(f"{path}, line {line}: not UTF-8 text (byte {error.start}); {_NEXT}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise LockError(f"{path}, line {line}: not text, but a binary file; {_NEXT}")
    return text


def _inside(folder: str) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    fit = [name for name in names if name in ("uv.lock", "poetry.lock") or name.startswith(("requirements", "pylock"))]
    return f"; it holds {', '.join(os.path.join(folder, name) for name in fit[:5])}" if fit else ""


def _beside(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        near = get_close_matches(name, os.listdir(folder or "."), 1)
    except OSError:
        return ""
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""
