"""A report for people as a page: paragraphs behind a head, folded to a width, plain or with the colours of a terminal.

The words and the folds are the same everywhere. On a terminal ``rich`` adds weight, colour and links where it is
installed; without it the marks alone are coloured.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from trainfix.environment.printable import printable

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 118  # of a page that is not shown on a terminal
_NARROWEST = 40
_LABEL = 13  # columns of a label with its colon

Look = Literal["plain", "opening", "group", "title", "line", "row", "count"]
_MARKS = {"[X]": "31", "[!]": "33", "[OK]": "32", "[-]": "2"}  # the mark's colour, as the number of an ANSI code
_RICH_MARKS = {"[X]": "not bold red", "[!]": "not bold yellow", "[OK]": "not bold green", "[-]": "not bold dim"}


@dataclass(frozen=True)
class Entry:
    """One paragraph: `text` behind `head`, its further lines indented by `margin`.

    `mark` is the sign at its front, or the one that it sums up; `url` is where its head leads.
    """

    text: str
    head: str = ""
    margin: int = 0
    look: Look = "plain"
    mark: str = ""
    url: str = ""


def width(output: str | None) -> int:
    """How wide the page is: as wide as the terminal, up to WIDTH, and WIDTH where it goes elsewhere (`output`)."""
    if output is not None or not sys.stdout.isatty():
        return WIDTH
    import shutil

    return max(_NARROWEST, min(WIDTH, shutil.get_terminal_size().columns))


def row(label: str, text: str, *, indent: int = 5) -> Entry:
    """`text` behind its label, with the label's column kept free below it. No label: it goes on with the one above."""
    head = " " * indent + (f"{label}:" if label else "").ljust(_LABEL)
    return Entry(text, head, len(head), "row")


def wrapped(label: str, text: str, indent: int = 5) -> Iterator[str]:
    """The lines of a row, at WIDTH; none for an empty text."""
    if text:
        yield from _folded(row(label, text, indent=indent), WIDTH)


def render(sections: Iterable[Iterable[Entry]], *, width: int, colour: bool) -> str:
    """The page: an empty line between sections, and none for an empty section."""
    filled = [[_safe(entry) for entry in section if entry.text.strip()] for section in sections]
    blocks = [entries for entries in filled if entries]
    if colour and _has_rich():
        return _rich(blocks, width)
    lines = _marked if colour else _folded
    return "\n\n".join("\n".join(line for entry in block for line in lines(entry, width)) for block in blocks) + "\n"


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None


def _safe(entry: Entry) -> Entry:
    return replace(entry, text=printable(entry.text), head=printable(entry.head))


def _folded(entry: Entry, width: int) -> list[str]:
    margin = " " * entry.margin
    return textwrap.wrap(
        entry.text,
        width,
        initial_indent=entry.head,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _marked(entry: Entry, width: int) -> list[str]:
    """The lines with nothing but the mark coloured."""
    first, *others = _folded(entry, width)
    if entry.mark and first.startswith(entry.mark):
        first = f"\033[{_MARKS[entry.mark]}m{entry.mark}\033[0m{first[len(entry.mark) :]}"
    return [first, *others]


def _rich(blocks: Sequence[Sequence[Entry]], width: int) -> str:
    """The page as rich shows it on a terminal."""
    from rich.console import Console
    from rich.rule import Rule

    console = Console(
        width=width, force_terminal=True, color_system="standard", legacy_windows=False, no_color=False, highlight=False
    )
    with console.capture() as capture:
        for number, block in enumerate(blocks):
            if number:
                console.print()
            for entry in block:
                lines = _styled(entry, _folded(entry, width))
                if entry.look == "group" and len(lines) == 1 and len(lines[0]) + 2 < width:
                    console.print(Rule(lines[0], align="left", style="dim"))
                    continue
                for line in lines:
                    console.print(line, no_wrap=True, overflow="ignore", crop=False)
    return capture.get()


def _styled(entry: Entry, lines: Sequence[str]) -> list[Text]:
    from rich.style import Style
    from rich.text import Text

    base = {"opening": "dim", "group": "bold", "title": "bold", "count": "bold"}.get(entry.look, "")
    styled = [Text(line, style=base) for line in lines]
    first = styled[0]
    for line in styled:
        for code in re.finditer(r"`[^`]+`", line.plain):
            line.stylize("cyan", *code.span())
    if entry.look == "row":
        first.stylize("dim", 0, len(entry.head.rstrip()))
    if entry.mark and entry.look == "count":
        first.stylize(_RICH_MARKS[entry.mark])
    elif entry.mark and entry.head:
        start = len(entry.mark)
        first.stylize(_RICH_MARKS[entry.mark], 0, start)
        word = re.compile(r"\S+").search(entry.head, start)
        if word and entry.url:
            first.stylize(Style(link=entry.url), *word.span())
    return styled
