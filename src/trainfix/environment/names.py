"""Names and versions as the packaging standards write them."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit


def normal(name: str) -> str:
    """The one form of a package's name: ``flash-attn`` for ``Flash_Attn``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> str | None:
    """`version` as the standard writes it; None if it is none."""
    from packaging.version import Version

    try:
        return str(Version(version))
    except ValueError:  # InvalidVersion, or a number too long to convert
        return None


def told_by_name(address: str) -> tuple[str, str] | None:
    """The package and version in an archive's file name, if the path or URL `address` leads to one."""
    from packaging.utils import parse_sdist_filename, parse_wheel_filename

    try:
        file = unquote(urlsplit(address).path).rpartition("/")[2]
        parsed = parse_wheel_filename(file)[:2] if file.endswith(".whl") else parse_sdist_filename(file)
        return str(parsed[0]), str(parsed[1])
    except ValueError:
        return None
