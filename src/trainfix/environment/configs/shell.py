"""The simple commands of a shell script, with the variables that it sets itself filled in. Nothing is ever executed.

A variable is filled in where every way through the script gives it one literal value. All else stays as written, with
its ``$``: what the environment, an argument or another program's output would tell (``$1``, ``${GA:-8}``, ``$(date)``).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from trainfix.environment.configs.shellsyntax import ASSIGNED, NAME, Statement, Text, TooMuch, parse

LARGEST = 2**18  # characters, of a script and of what its variables unfold to
# What launchers read from their environment.
LAUNCH_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NNODES", "NPROC_PER_NODE")
_DEEPEST = 4  # commands in quotes in commands in quotes
_VARIABLE = re.compile(rf"\$(?:({NAME})|\{{({NAME})(\[[@*]\])?(?::?[-=?+][^}}]*)?\}})")
_SPECIAL = re.compile(r"\$[0-9@*#?$!_-]")
_MANY = re.compile(r"\$[@*]|\$\{[@*]\}|\[[@*]\]\}")
_SETS = frozenset(("export", "readonly", "local", "declare", "typeset"))
_CHANGED = re.compile(rf"({NAME})\s*(?:<<|>>|[-+*/%&|^])?=(?!=)|({NAME})(?:\+\+|--)|(?:\+\+|--)({NAME})")
# Sourced files that set up a shell, and not a training.
_SETUP = re.compile(r"(activate|conda\.sh|\.?bash_?(rc|_profile|profile)|profile|\.zshrc)$")
_LONGEST = 80  # characters of an expression
_OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: lambda a, b: int(a / b)}
)
_SHELL = re.compile(r"(?:.*/)?(?:ba|da|z|k)?sh")


@dataclass(frozen=True)
class Simple:
    """One command with its words.

    environment: variables that the script sets for it, of those that it exports only LAUNCH_VARIABLES.
    source: the last file that the script reads before, if any.
    """

    words: tuple[Text, ...]
    environment: Mapping[str, str]
    source: str

    @property
    def line(self) -> int:
        """The line of its first word."""
        return self.words[0].line


def is_literal(text: str) -> bool:
    """Whether nothing in it waits for a run of the script."""
    return "$" not in text and "`" not in text


def may_be_many(text: str) -> bool:
    """Whether it stands for any number of words, and never for one value: ``"$@"``, ``${ARGS[@]}``."""
    return bool(_MANY.search(text))


def simple_commands(source: Text) -> tuple[Simple, ...]:
    """The commands of a script in their order, those in ``bash -c "..."`` and ``eval`` too.

    Raises TooMuch and SyntaxFault.
    """
    return tuple(_Run(source, _Budget()).commands())


@dataclass
class _Budget:
    """What is left of `LARGEST` for a script and all that it unfolds to."""

    left: int = LARGEST

    def take(self, texts: Sequence[Text]) -> None:
        self.left -= sum(len(one.text) for one in texts)
        if self.left < 0:
            raise TooMuch


@dataclass(frozen=True)
class _Value:
    """What a variable holds: the words of an array, one text otherwise, None if it is not known."""

    words: tuple[Text, ...] | None
    blocks: tuple[int, ...]

    @property
    def texts(self) -> tuple[str, ...] | None:
        return None if self.words is None else tuple(word.text for word in self.words)


@dataclass
class _Run:
    """Goes through a script once, from the top."""

    text: Text
    budget: _Budget
    depth: int = 0
    values: dict[str, _Value] = field(default_factory=dict)
    constants: dict[str, _Value] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    source: str = ""

    def __post_init__(self) -> None:
        self.budget.take([self.text])
        self.script = parse(self.text)
        self.assigned: dict[str, list[int]] = {}
        for number, statement in enumerate(self.script.statements):
            for name in _names(statement):
                self.assigned.setdefault(name, []).append(number)

    def commands(self) -> Iterator[Simple]:
        previous_sets = False
        for number, statement in enumerate(self.script.statements):
            conditional = statement.after == "||" or (statement.after == "&&" and not previous_sets)
            self._assign(number, statement, conditional=conditional)
            words = self._words(number, statement)
            previous_sets = not words or words[0].text in (*_SETS, "cd", "set", "source", ".", "echo", "mkdir")
            if words:
                yield from self._command(words, self._environment(number, statement))

    def _command(self, words: tuple[Text, ...], environment: Mapping[str, str]) -> Iterator[Simple]:
        if words[0].text in ("source", ".") and len(words) > 1:
            self._read_file(words[1].text)
            return
        inner = _quoted_command(words)
        if inner is None:
            yield Simple(words, environment, self.source)
        elif self.depth < _DEEPEST:
            for one in _Run(inner, self.budget, self.depth + 1).commands():
                yield Simple(one.words, {**environment, **one.environment}, one.source or self.source)

    def _read_file(self, file: str) -> None:
        """Another file's statements, which are not read: it may set any variable."""
        if not _SETUP.search(file):
            self.source, self.values = file, {}

    def _words(self, number: int, statement: Statement) -> tuple[Text, ...]:
        """The command's words, without the assignments before it."""
        written = list(statement.words)
        while written and ASSIGNED.match(written[0].text):
            written.pop(0)
        return tuple(field for word in written for field in self._fields(word, number, statement))

    def _environment(self, number: int, statement: Statement) -> dict[str, str]:
        found = {}
        for name in self.exported.intersection(LAUNCH_VARIABLES):
            value = self._value(name, number, statement)
            if value is not None and len(value) == 1:
                found[name] = value[0].text
        for word in statement.words:
            match = ASSIGNED.match(word.text)
            if match is None:
                break
            found[match[1]] = self._text(word.cut(match.end()), number, statement).text
        return found

    # Variables

    def _assign(self, number: int, statement: Statement, *, conditional: bool) -> None:
        """What this statement does to the variables."""
        words = statement.words
        blocks = (*statement.blocks, -1 - number) if conditional else statement.blocks
        first = words[0].text
        if first in _SETS:
            if first == "export":
                self.exported.update(word.text.partition("=")[0] for word in words[1:])
            words = tuple(word for word in words[1:] if not word.text.startswith("-"))
        elif not all(ASSIGNED.match(word.text) for word in words):
            for name in _names(statement):
                self._set(name, self._read(statement, number), blocks)
            return
        for word in words:
            match = ASSIGNED.match(word.text)
            if match is not None:
                self._set(match[1], self._assigned(word, number, statement), blocks)
                if first == "readonly":
                    self.constants[match[1]] = self.values[match[1]]

    def _set(self, name: str, words: tuple[Text, ...] | None, blocks: tuple[int, ...]) -> None:
        value, known = _Value(words, blocks), self.values.get(name)
        if known is None or known.texts != value.texts or blocks[: len(known.blocks)] != known.blocks:
            self.values[name] = value

    def _assigned(self, word: Text, number: int, statement: Statement) -> tuple[Text, ...] | None:
        """The value in ``NAME=value``, ``NAME=(words)`` and ``NAME+=value``."""
        match = ASSIGNED.match(word.text)
        if match is None or "[" in match[0]:
            return None
        before: tuple[Text, ...] | None = ()
        if match[2]:
            before = self._value(match[1], number, statement)
        given = word.cut(match.end())
        if before is None:
            return None
        if given.text.startswith("("):
            inside = parse(given.cut(1, len(given.text) - 1))
            items = [item for one in inside.statements for item in one.words]
            return (*before, *(field for item in items for field in self._fields(item, number, statement)))
        return (_joined((*before, self._text(given, number, statement))),)

    def _read(self, statement: Statement, number: int) -> tuple[Text, ...] | None:
        """What ``read NAME <<EOF`` puts into its variable."""
        here = statement.here
        names = _names(statement)
        if here is None or statement.words[0].text != "read" or len(names) != 1:
            return None
        body = here.body if here.literal else self._text(here.body, number, statement, here=True)
        whole = any(word.text in ("-d", "-rd", "-d''", '-d""') for word in statement.words)
        end = len(body.text) if whole else (body.text.find("\n") + 1 or len(body.text))
        return (body.cut(0, len(body.text[:end].rstrip())),)

    def _value(self, name: str, number: int, statement: Statement) -> tuple[Text, ...] | None:
        """The words of a variable where it is used, None if the script alone does not tell."""
        known = self.values.get(name) or self.constants.get(name)
        if known is None or statement.blocks[: len(known.blocks)] != known.blocks:
            return None
        for block in statement.blocks[len(known.blocks) :]:
            kind = self.script.kinds[block]
            if kind == "function" and len(self.assigned.get(name, ())) > 1:
                return None  # the call decides
            if kind == "loop" and self._changes_later(name, number, block):
                return None  # another value from the second round on
        return known.words

    def _changes_later(self, name: str, number: int, block: int) -> bool:
        """Whether a later statement of a loop sets the variable."""
        for later in reversed(self.assigned.get(name, ())):
            if later <= number:
                return False
            if block in self.script.statements[later].blocks:
                return True
        return False

    # Expansion

    def _text(self, word: Text, number: int, statement: Statement, *, here: bool = False) -> Text:
        """A word as one text."""
        return _joined(self._fields(word, number, statement, split=False, here=here))

    def _fields(
        self, word: Text, number: int, statement: Statement, *, split: bool = True, here: bool = False
    ) -> list[Text]:
        """A word as the command gets it: several words where an unquoted variable holds several."""
        fields: list[list[Text]] = [[]]
        given = False  # whether the last field exists, be it empty
        text, at, quoted = word.text, 0, here
        while at < len(text):
            end = at + 1
            if text[at] == "\\":
                end = at + 2
                taken = _escaped(word.cut(at, end), quoted=quoted)
            elif text[at] == '"' and not here:
                quoted, given, at = not quoted, True, end
                continue
            elif text[at] == "'" and not quoted:
                end = text.find("'", end) + 1
                taken, given = word.cut(at + 1, end - 1), True
            elif text[at] == "$":
                end, values = self._dollar(word, at, number, statement)
                if values is not None:
                    self.budget.take(values)
                    self._add(fields, values, split=split and not quoted)
                    given, at = bool(fields[-1]) or quoted, end
                    continue
                taken = _shortened(word.cut(at, end))
            elif text[at] == "`":
                end = (text.find("`", end) + 1) or len(text)
                taken = _shortened(word.cut(at, end))
            else:
                while end < len(text) and text[end] not in "\\\"'$`":
                    end += 1
                taken = word.cut(at, end)
            fields[-1].append(taken)
            given, at = True, end
        return [_joined(parts) for parts in (fields if given else fields[:-1])]

    def _dollar(self, word: Text, at: int, number: int, statement: Statement) -> tuple[int, tuple[Text, ...] | None]:
        """Where a ``$`` ends, and the values there, None if they are not known."""
        match = _VARIABLE.match(word.text, at)
        if match is None:
            special = _SPECIAL.match(word.text, at)
            end = special.end() if special else _substitution_end(word.text, at)
            return end, self._arithmetic(word.cut(at, end), number, statement)
        values = self._value(match[1] or match[2], number, statement)
        by_default = match[2] is not None and "+" in match[0]
        if values is None or by_default or (not any(one.text for one in values) and match[0].count(":")):
            return match.end(), None
        return match.end(), values if match[3] else values[:1]

    def _arithmetic(self, word: Text, number: int, statement: Statement) -> tuple[Text, ...] | None:
        """The number that ``$((...))`` gives, where all in it is known."""
        if not word.text.startswith("$((") or not word.text.endswith("))"):
            return None

        def value(match: re.Match[str]) -> str:
            values = self._value(match[1], number, statement)
            return values[0].text if values else match[0]

        result = calculated(re.sub(rf"\$?\{{?({NAME})\}}?", value, word.text[3:-2]))
        return None if result is None else (Text(str(result), [word.line] * len(str(result))),)

    def _add(self, fields: list[list[Text]], values: Sequence[Text], *, split: bool) -> None:
        for index, value in enumerate(values):
            parts = _split(value) if split else [value]
            leads = split and value.text[:1].isspace()
            for position, part in enumerate(parts):
                if position or (index and fields[-1]) or (leads and fields[-1]):
                    fields.append([])
                fields[-1].append(part)
            if split and value.text[-1:].isspace() and fields[-1]:
                fields.append([])


def calculated(text: str) -> int | None:
    """What the shell makes of an expression of whole numbers with + - * / and brackets; None of anything else."""
    if len(text) > _LONGEST or not re.fullmatch(r"[\d\s+*/()-]+", text):
        return None
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError


def _names(statement: Statement) -> list[str]:
    """The variables that a statement sets or changes."""
    first, *rest = [word.text for word in statement.words]
    if first.startswith("((") or first == "let":
        return [next(filter(None, found)) for found in _CHANGED.findall(" ".join((first, *rest)))]
    if first == "for" and rest:
        return [rest[0]] if re.fullmatch(NAME, rest[0]) else _names(Statement((statement.words[1],), None, (), ""))
    if first in ("read", "mapfile", "readarray", "getopts", "unset", "select"):
        return [word for word in rest if re.fullmatch(NAME, word)]
    if first == "printf" and rest[:1] == ["-v"]:
        return rest[1:2]
    words = rest if first in _SETS else [first, *rest]
    found = [match[1] for match in map(ASSIGNED.match, words) if match is not None]
    alone = all(ASSIGNED.match(word) for word in words)
    return found if first in _SETS or alone else []


def _quoted_command(words: Sequence[Text]) -> Text | None:
    """The script in ``bash -c "..."``, whatever starts that shell, or in ``eval``."""
    if words[0].text == "eval":
        return _joined(words[1:], Text(" ", (words[0].line,)))
    for place, word in enumerate(words[:-2]):
        if _SHELL.fullmatch(word.text) and re.fullmatch(r"-[a-z]*c", words[place + 1].text):
            return words[place + 2]
    return None


def _joined(parts: Sequence[Text], between: Text | None = None) -> Text:
    if len(parts) == 1:
        return parts[0]
    text: list[str] = []
    lines: list[int] = []
    for part in parts:
        if between is not None and text:
            text.append(between.text)
            lines.extend(between.lines)
        text.append(part.text)
        lines.extend(part.lines)
    return Text("".join(text), lines)


def _split(value: Text) -> list[Text]:
    return [value.cut(match.start(), match.end()) for match in re.finditer(r"\S+", value.text)]


def _escaped(pair: Text, *, quoted: bool) -> Text:
    r"""What ``\x`` stands for; in double quotes the backslash stays before most characters."""
    if pair.text == "\\\n":
        return pair.cut(0, 0)
    return pair if quoted and pair.text[1:] not in ("$", "`", '"', "\\") else pair.cut(1)


def _shortened(unknown: Text) -> Text:
    """What is not known, as written, without what would fall apart into words."""
    if not any(character.isspace() or character in "\"'" for character in unknown.text):
        return unknown
    kept = f"{unknown.text[:2]}…{unknown.text[-1]}"
    return Text(kept, [unknown.line] * len(kept))


def _substitution_end(text: str, at: int) -> int:
    """Where ``$(...)`` or ``${...}`` ends; a lone ``$`` ends at once."""
    pairs = {"(": ")", "{": "}"}
    opening = text[at + 1 : at + 2]
    if opening not in pairs:
        return at + 1
    depth = 0
    for place in range(at + 1, len(text)):
        depth += (text[place] == opening) - (text[place] == pairs[opening])
        if depth == 0:
            return place + 1
    return len(text)
