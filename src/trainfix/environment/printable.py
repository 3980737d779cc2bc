"""Text of examined files, made safe to show: no control character of theirs reaches a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with every character that does not print (escapes, line ends, bidirectional marks) as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
