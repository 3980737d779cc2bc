"""The statements of a shell script, as written: words, quotes included, here-documents, and the blocks around them.

A scanner for the part of bash that scripts which start a training use. What it does not know it takes as words; it
never fails, but for a quote or bracket that is never closed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

BlockKind = Literal["branch", "loop", "function", "subshell", "case", "group"]

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
ASSIGNED = re.compile(rf"({NAME})(?:\[[^\]]*\])?(\+?)=")
_OPERATORS = re.compile(r"&>>|<<<|<<-|<<|&>|>>|>&|<&|&&|\|\||;;|\|&|[;&|()<>\n]")
_REDIRECTIONS = frozenset(("&>>", "<<<", "&>", ">>", ">&", "<&", "<", ">"))
DEEPEST = 100  # blocks within blocks
_OPENING = frozenset(("if", "while", "until", "!", "time"))


class SyntaxFault(Exception):
    """The script ends inside a quote or bracket. `line`: where it opens; `what`: the character."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(line, what)
        self.line, self.what = line, what


class TooMuch(Exception):
    """The script is larger or deeper than any that starts a training, or its variables unfold to more."""


@dataclass(frozen=True)
class Text:
    """Some text of a file, with the line of each of its characters."""

    text: str
    lines: Sequence[int]

    @classmethod
    def of(cls, text: str, line: int = 1) -> Text:
        """`text`, which begins on `line`."""
        lines = []
        for character in text:
            lines.append(line)
            line += character == "\n"
        return cls(text, lines)

    @property
    def line(self) -> int:
        """The line where it begins."""
        return self.lines[0] if self.lines else 0

    def cut(self, start: int, end: int | None = None) -> Text:
        """The characters from `start` to `end`."""
        return Text(self.text[start:end], self.lines[start:end])


@dataclass
class HereDocument:
    """What follows ``<<``. `literal`: its variables stay as they are."""

    end: str
    literal: bool
    strips_tabs: bool
    body: Text = field(default_factory=lambda: Text("", ()))


@dataclass(frozen=True)
class Statement:
    """One simple command as written. `blocks`: the numbers of the blocks around it, outermost first; `after`: the
    operator before it."""

    words: tuple[Text, ...]
    here: HereDocument | None
    blocks: tuple[int, ...]
    after: str


@dataclass
class Script:
    """All statements, and the kind of each numbered block."""

    statements: list[Statement] = field(default_factory=list)
    kinds: dict[int, BlockKind] = field(default_factory=dict)


def parse(source: Text) -> Script:
    """The statements of `source`. Raises SyntaxFault and TooMuch."""
    return _Parser(source).script()


class _Parser:
    """Groups what the scanner finds into statements, and follows the blocks."""

    def __init__(self, source: Text) -> None:
        self._scan = _Scanner(source)
        self._found = Script()
        self._open: list[tuple[BlockKind, int | None]] = []
        self._words: list[Text] = []
        self._here: HereDocument | None = None
        self._after = "\n"
        self._names_function = False

    def script(self) -> Script:
        while (token := self._scan.token()) is not None:
            if isinstance(token, HereDocument):
                self._here = token
            elif isinstance(token, Text):
                self._word(token)
            else:
                self._operator(token)
        self._operator("\n")
        return self._found

    def _word(self, word: Text) -> None:
        if self._words or not self._keyword(word.text):
            self._words.append(word)

    def _keyword(self, word: str) -> bool:
        """Whether a word that begins a statement is the shell's own."""
        if word in _OPENING:
            return True
        if word in ("then", "else", "elif", "do"):
            if word in ("else", "elif"):
                self._close("branch")
            if word != "elif":
                self._begin("loop" if word == "do" else "branch")
        elif word in ("fi", "done", "esac", "}"):
            self._close({"fi": "branch", "done": "loop", "esac": "case"}.get(word, "function"))
        elif word == "{":
            self._begin("function" if self._names_function else "group")
            self._names_function = False
        else:
            return False
        return True

    def _operator(self, operator: str) -> None:
        first = self._words[0].text if self._words else ""
        if operator == "(" and len(self._words) == 1 and not self._here:
            self._names_function, self._words = True, []
            return
        if operator == ")" and self._names_function and not self._words:
            return
        if operator == ")" and self._open and self._open[-1][0] == "case":
            self._words = []  # the pattern of a case
            self._close("case")
            self._begin("case")
            return
        if first == "function":
            self._names_function = self._words[-1].text == "{"
            if self._names_function:
                self._keyword("{")
            self._words = []
        self._finish()
        if first == "case":
            self._begin("case")
        elif operator == "(":
            self._begin("subshell")
        elif operator == ")":
            self._close("subshell")
        self._after = operator

    def _finish(self) -> None:
        if self._words and self._words[0].text != "case":
            blocks = tuple(number for _, number in self._open if number is not None)
            self._found.statements.append(Statement(tuple(self._words), self._here, blocks, self._after))
        self._words, self._here = [], None

    def _begin(self, kind: BlockKind) -> None:
        if len(self._open) >= DEEPEST:
            raise TooMuch
        number = None if kind == "group" else len(self._found.kinds)
        if number is not None:
            self._found.kinds[number] = kind
        self._open.append((kind, number))

    def _close(self, kind: str) -> None:
        """Ends the innermost block if it is of this kind; ``}`` ends a group or a function."""
        if self._open and (self._open[-1][0] == kind or (kind == "function" and self._open[-1][0] == "group")):
            self._open.pop()


class _Scanner:
    """Cuts a script into words, operators and here-documents."""

    def __init__(self, source: Text) -> None:
        self._source, self._text, self._at = source, source.text, 0
        self._pending: list[HereDocument] = []

    def token(self) -> Text | HereDocument | str | None:
        """The next one, None at the end."""
        while self._at < len(self._text):
            self._skip()
            if self._at >= len(self._text):
                break
            if self._text.startswith("((", self._at):
                return self._arithmetic()
            found = _OPERATORS.match(self._text, self._at)
            if found is None or self._text.startswith(("<(", ">("), self._at):
                word = self._word()
                if word.text.isdigit() and self._text[self._at : self._at + 1] in ("<", ">"):
                    continue  # the number of a redirection
                return word
            operator = found[0]
            self._at = found.end()
            if operator in ("<<", "<<-"):
                return self._here(strips_tabs=operator == "<<-")
            if operator in _REDIRECTIONS:
                self._skip()
                self._word()
                continue
            if operator == "\n":
                self._bodies()
            return operator
        return None

    def _skip(self) -> None:
        """To the next token: blanks, continued lines, comments."""
        text, at = self._text, self._at
        while at < len(text):
            if text[at] in " \t\r":
                at += 1
            elif text.startswith("\\\n", at):
                at += 2
            elif text[at] == "#":
                at = _or_end(text.find("\n", at), text)
            else:
                break
        self._at = at

    def _word(self) -> Text:
        start = self._at
        self._at = self._word_end(start)
        return self._source.cut(start, self._at)

    def _word_end(self, at: int) -> int:
        text, start = self._text, at
        if text.startswith(("<(", ">("), at):
            return self._closed(at + 1, "(", ")")
        while at < len(text) and text[at] not in " \t\r\n;&|)<>":
            if text[at] != "(":
                at = self._after(at)
            elif ASSIGNED.fullmatch(text, start, at):
                at = self._closed(at, "(", ")")  # an array
            else:
                break
        return at

    def _after(self, at: int) -> int:
        """Where what begins at `at` ends: a quoted part, a substitution, or one character."""
        text = self._text
        if text[at] == "\\":
            return min(at + 2, len(text))
        if text[at] == "'":
            return self._found("'", at)
        if text.startswith("$'", at):
            return self._quoted(at + 1, "'")
        if text[at] in '"`':
            return self._quoted(at, text[at])
        if text.startswith("$(", at):
            return self._closed(at + 1, "(", ")")
        if text.startswith("${", at):
            return self._closed(at + 1, "{", "}")
        return at + 1

    def _found(self, mark: str, at: int) -> int:
        end = self._text.find(mark, at + 1)
        if end < 0:
            raise SyntaxFault(self._source.lines[at], mark)
        return end + 1

    def _quoted(self, start: int, mark: str) -> int:
        at = start + 1
        while at < len(self._text):
            if self._text[at] == mark:
                return at + 1
            nested = mark == '"' and (self._text[at] == "`" or self._text.startswith(("$(", "${"), at))
            at = self._after(at) if nested else at + (2 if self._text[at] == "\\" else 1)
        raise SyntaxFault(self._source.lines[start], mark)

    def _closed(self, start: int, opening: str, closing: str) -> int:
        """Where the bracket at `start` is closed."""
        at, depth = start, 0
        while at < len(self._text):
            character = self._text[at]
            if character in (opening, closing):
                depth += 1 if character == opening else -1
                at += 1
                if depth == 0:
                    return at
            elif character == "#" and opening == "(" and self._text[at - 1] in " \t\n(":
                at = _or_end(self._text.find("\n", at), self._text)
            elif character in "\\'\"`":
                at = self._after(at)
            else:
                at += 1
        raise SyntaxFault(self._source.lines[start], opening)

    def _arithmetic(self) -> Text:
        start = self._at
        self._at = self._closed(start, "(", ")")
        return self._source.cut(start, self._at)

    def _here(self, *, strips_tabs: bool) -> HereDocument:
        self._skip()
        word = self._word().text
        end = word.translate({ord(mark): None for mark in "'\"\\"})
        document = HereDocument(end, literal=end != word, strips_tabs=strips_tabs)
        self._pending.append(document)
        return document

    def _bodies(self) -> None:
        """Reads the here-documents that begin after this line."""
        for document in self._pending:
            start = self._at
            while self._at < len(self._text):
                stop = _or_end(self._text.find("\n", self._at), self._text)
                line = self._text[self._at : stop]
                if (line.lstrip("\t") if document.strips_tabs else line) == document.end:
                    document.body = self._source.cut(start, self._at)
                    self._at = min(stop + 1, len(self._text))
                    break
                self._at = min(stop + 1, len(self._text))
            else:
                document.body = self._source.cut(start)
        self._pending = []


def _or_end(at: int, text: str) -> int:
    return at if at >= 0 else len(text)
