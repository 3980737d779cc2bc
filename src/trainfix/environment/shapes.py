"""Canonical shapes: a short hash of a function's syntax tree that tells buggy, fixed and unknown bodies apart.

Two sources have the same shape when their syntax trees agree after dropping docstrings, annotations of
version-dependent fields, and known decorators. ``ast.dump`` will not do: its output differs between Python 3.11,
3.12 and 3.13. The same digest comes from the installed text (``shape_in_text``) and from the live function
(``shape_of_function``).
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import re
import types
from functools import lru_cache

DIGITS = 12
# Decorators that wrap without changing what a body computes, as they are written above it ...
KNOWN_DECORATORS = frozenset(
    {"instrument_w_nvtx", "torch.no_grad", "compiler.disable", "torch.compiler.disable", "torch._disable_dynamo"}
)
# ... and as they are found alive: the wrapper's (file, name) and the closure cell in which it holds what it wraps.
# DeepSpeed's instrument_w_nvtx sets no __wrapped__.
_WRAPPERS = {
    ("deepspeed/utils/nvtx.py", "wrapped_fn"): "func",
    ("torch/utils/_contextlib.py", "decorate_context"): "func",
    ("torch/_dynamo/eval_frame.py", "_fn"): "fn",
    ("torch/_compile.py", "inner"): "fn",
}
# Fields that differ between Python versions or carry no meaning.
_SKIPPED = frozenset({"type_params", "kind", "type_comment", "ctx", "type_ignores"})

_SAMPLE = '''
@torch.no_grad()
def sample(self, *rest, key: int = 0, **options) -> None:
    """A docstring, which is dropped."""
    if not (rest and key) or f"{key!r:>{8}}" == "x":
        return [value for _, value in options.items() if value is not None]
    with self.lock as held, open(b"name"):
        held[1:, ...] += -0.5
    try:
        del held.x
    except (OSError, ValueError) as error:
        raise RuntimeError("no") from error
'''
_SAMPLE_SHAPE = "b12441d494c5"


class ShapeError(Exception):
    """This Python hashes the bundled sample differently: shapes cannot be compared. Says nothing about any package."""


def _canonical(node: object) -> str:
    if isinstance(node, ast.AST):
        fields = []
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(node, ast.JoinedStr) and name == "values":
                value = _merged(value or [])
            empty = value is None or value == []
            if name in _SKIPPED or (empty and not (isinstance(node, ast.Constant) and name == "value")):
                continue
            fields.append(f"{name}={_canonical(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return "[" + ";".join(map(_canonical, node)) + "]"
    return repr(node)


def _merged(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, neighbouring texts joined: some Python 3.12 releases split them or add empty ones."""
    merged: list[ast.expr] = []
    for value in values:
        text = value.value if isinstance(value, ast.Constant) else None
        last = merged[-1] if merged else None
        if text == "":
            continue
        if isinstance(text, str) and isinstance(last, ast.Constant) and isinstance(last.value, str):
            merged[-1] = ast.Constant(last.value + text)
        else:
            merged.append(value)
    return merged


def _is_known_decorator(node: ast.expr) -> bool:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node) in KNOWN_DECORATORS


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _simplify(function: ast.AST) -> None:
    for node in ast.walk(function):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if _is_docstring(node.body[0]):
                node.body = node.body[1:] or [ast.Pass()]
            node.decorator_list = [d for d in node.decorator_list if not _is_known_decorator(d)]


def _digest(function: ast.AST) -> str:
    _simplify(function)
    return hashlib.sha256(_canonical(function).encode()).hexdigest()[:DIGITS]


@lru_cache(maxsize=1)
def _check_sample() -> None:
    found = _digest(ast.parse(_SAMPLE).body[0])
    if found != _SAMPLE_SHAPE:
        raise ShapeError(
            f"this Python hashes trainfix's bundled sample as {found}, expected {_SAMPLE_SHAPE}: its syntax trees "
            "differ from the ones trainfix was built for. Nothing is wrong with your packages; "
            "use Python 3.10 to 3.13 or a newer trainfix."
        )


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _block(lines: list[str], first: int) -> ast.stmt | None:
    """The function whose decorators or ``def`` begin at index `first`, parsed alone: the file around it is not."""
    depth = _indent(lines[first])
    for last in range(first + 1, len(lines) + 1):
        line = lines[last] if last < len(lines) else "end"
        if not line.strip() or line.lstrip().startswith("#") or _indent(line) > depth:
            continue
        # A line as shallow as the definition: the end, unless we are still inside brackets, a string or the decorators.
        text = "".join(lines[first:last])
        try:
            parsed = ast.parse(("if 1:\n" if depth else "") + text)
        except SyntaxError:
            continue
        found = parsed.body[0]
        return found.body[0] if depth and isinstance(found, ast.If) else found
    return None


ABSENT = "absent"  # stands where a shape would, when a module's source is there and the function is not in it


def shape_in_text(text: str, qualname: str) -> str | None:
    """Shape of `qualname` (``Class.method`` or ``function``) in the source `text`; None if it is not there.

    Only the function itself is parsed, so a file of 3000 lines costs a few milliseconds.
    Raises ShapeError when this Python's syntax trees cannot be compared.
    """
    _check_sample()
    *classes, name = qualname.split(".")
    lines, inside = _lines(text), _inside(text, tuple(classes))
    if inside is None:
        return None
    begin, end, depth = inside
    at = _find(lines, begin, end, depth, f"def {name}", last=True)
    if at is None:
        return None
    while at > begin and lines[at - 1].lstrip().startswith("@"):
        at -= 1
    block = _block(lines, at)
    return _digest(block) if block is not None else None


@lru_cache(maxsize=4)
def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@lru_cache(maxsize=8)  # one class holds most of the functions that are asked for
def _inside(text: str, classes: tuple[str, ...]) -> tuple[int, int, int] | None:
    """The first line of the body of the innermost of these classes, the line after its last, and its indent."""
    lines = _lines(text)
    begin, end, depth = 0, len(lines), -1
    for owner in classes:
        at = _find(lines, begin, end, depth, f"class {owner}")
        if at is None:
            return None
        depth = _indent(lines[at])
        begin, end = at + 1, _end_of_class(lines, at, end)
    return begin, end, depth


def _find(lines: list[str], begin: int, end: int, depth: int, wanted: str, last: bool = False) -> int | None:
    """Index of the line directly inside `depth` that defines `wanted`; the last if `last`: a later def replaces an
    earlier one."""
    definition = re.compile(rf"\s*(async )?{re.escape(wanted)}\b")
    near = [i for i in range(begin, end) if wanted in lines[i]]  # the quick look: a file has thousands of lines
    hits = [i for i in near if definition.match(lines[i]) and _indent(lines[i]) > depth]
    if not hits:
        return None
    shallowest = min(_indent(lines[i]) for i in hits)
    hits = [i for i in hits if _indent(lines[i]) == shallowest]
    return hits[-1] if last else hits[0]


def _end_of_class(lines: list[str], at: int, end: int) -> int:
    outside = re.compile(rf" {{0,{_indent(lines[at])}}}[A-Za-z@]")
    deeper = " " * (_indent(lines[at]) + 1)
    return next((i for i in range(at + 1, end) if not lines[i].startswith(deeper) and outside.match(lines[i])), end)


def unwrap(function: object) -> types.FunctionType | None:
    """The plain function behind a method and its known decorators; None if there is none (a builtin, say)."""
    function = getattr(function, "__func__", function)
    while type(function) is types.FunctionType:  # isinstance would believe wrapt's proxies
        cell = decorator_cell(function)
        if cell is None:
            return function
        function = cell.cell_contents
    return None


def decorator_cell(function: types.FunctionType) -> types.CellType | None:
    """The closure cell in which a known decorator holds what it decorates; None if `function` is nobody's wrapper."""
    code = function.__code__
    known = (cell for (file, name), cell in _WRAPPERS.items() if code.co_name == name and _is_file(code, file))
    name = next(known, None)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return cells.get(name) if name is not None else None


def _is_file(code: types.CodeType, file: str) -> bool:
    return code.co_filename.replace("\\", "/").endswith("/" + file)


def shape_of_function(function: object) -> str | None:
    """Shape of a live function or method, read from the file it was compiled from; None if it has no source.

    Raises ShapeError as `shape_in_text` does.
    """
    _check_sample()
    plain = unwrap(function)
    if plain is None:
        return None
    code = plain.__code__
    linecache.checkcache(code.co_filename)  # a reload may have read a newer text
    lines = linecache.getlines(code.co_filename)
    if not 0 < code.co_firstlineno <= len(lines):
        return None
    block = _block(lines, code.co_firstlineno - 1)
    if not isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef)) or block.name != code.co_name:
        return None
    return _digest(block)
