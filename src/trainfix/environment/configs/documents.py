"""Files as data, read safely: JSON, YAML and text, with the lines of their keys. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 16 * 2**20  # bytes; no config of a run comes near
DEEPEST = 64
MOST_NODES = 100_000
_ABOVE = 4  # how many folders above a config are looked into for a file that it names


class ConfigError(Exception):
    """A config file cannot be read. The message names the file, the place in it and the next step."""


@dataclass(frozen=True)
class Document:
    """One file. `content` is what it holds, nothing where it is neither JSON nor YAML. `lines`: of key paths, where the
    format tells them."""

    path: str
    text: str
    content: Mapping[str, Any]
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def line(self, *written: str) -> int | None:
        """The line of a key path, 1 for the first; None if it is not known."""
        if written in self.lines or not written:
            return self.lines.get(written)
        places = [found.start() for found in re.finditer(rf'"{re.escape(written[-1])}"\s*:', self.text)]
        return self.text.count("\n", 0, places[0]) + 1 if len(places) == 1 else None


def read(path: str) -> Document:
    """The document in the file `path`. Raises ConfigError."""
    return parse(path, _text(path))


def find(named: str, beside: str) -> str | None:
    """The file that a config names: from the current folder, where programs look, else from its own or one above."""
    folders = [Path(), *Path(beside).parents[:_ABOVE]] if not Path(named).is_absolute() else [Path()]
    try:
        return next((str(folder / named) for folder in folders if (folder / named).is_file()), None)
    except (OSError, ValueError):
        return None


def parse(path: str, text: str) -> Document:
    """The document that `text` is: YAML by the name, JSON by the name or the first character, else plain text."""
    if path.lower().endswith((".yaml", ".yml")):
        content, lines = _yaml(path, text)
        return Document(path, text, _whole(path, content, "YAML mapping, key: value"), lines)
    if path.lower().endswith(".json") or text.lstrip()[:1] in ("{", "["):
        return Document(path, text, _whole(path, _json(path, text), "JSON object, {...}"))
    return Document(path, text, {})


def _whole(path: str, content: object, wanted: str) -> dict[str, object]:
    if isinstance(content, dict):
        return content
    kind = {list: "a list", str: "a string", type(None): "nothing"}.get(type(content), "a single value")
    raise ConfigError(f"{path} holds {kind}: a config is one {wanted}")


def _text(path: str) -> str:
    try:
        file = Path(path)
        if file.is_file() and file.stat().st_size > LARGEST:
            raise ConfigError(f"{path} has more than {LARGEST >> 20} MiB: no config of a run is that large")
        return file.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: name the config file itself{_inside(path)}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file{_beside(path)}; name the config file that the run uses") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): name a config file") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {why}; make it readable, or name another file") from None


def _json(path: str, text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys: set[str] = set()
        for key, _ in pairs:
            if key in keys:
                raise ConfigError(
                    f"{path}: the key {key!r} stands twice in one object, which DeepSpeed refuses; remove one"
                )
            keys.add(key)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        place = f"{path}, line {error.lineno} column {error.colno}"
        raise ConfigError(f"{place}: {_advice(line, error.msg)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a usable JSON file ({error}): correct it") from None


def _advice(line: str, message: str) -> str:
    if "//" in line or "#" in line or "/*" in line:
        return "not valid JSON: it has no comments (DeepSpeed's own reader skips them); remove the comment"
    return f"not valid JSON ({message}); correct it there"


def _yaml(path: str, text: str) -> tuple[object, Mapping[tuple[str, ...], int]]:
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{path} is YAML, which needs PyYAML to be read: pip install 'trainfix[cli]'") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        reader = _Nodes(path, loader)
        content = None if node is None else reader.value(node, ())
        return content, reader.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{place}: not valid YAML ({error.problem or error.context}); correct it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is not a usable YAML file ({why}): correct it") from None


class _Nodes:
    """YAML's nodes as plain data, as the safe loader makes them, with the lines of their keys."""

    def __init__(self, path: str, loader: Any) -> None:
        self.path, self.loader = path, loader
        self.lines: dict[tuple[str, ...], int] = {}
        self._visited = 0

    def value(self, node: Any, place: tuple[str, ...]) -> object:
        self._visited += 1
        if self._visited > MOST_NODES or len(place) > DEEPEST:
            raise ConfigError(f"{self.path} unfolds to more than a config can hold (anchors, or deep nesting)")
        if node.tag not in self.loader.yaml_constructors:
            raise ConfigError(
                f"{self.path}, line {node.start_mark.line + 1}: the tag {node.tag} is not plain data; remove it"
            )
        if node.id == "mapping":
            return self._mapping(node, place)
        if node.id == "sequence":
            return [self.value(item, (*place, str(number))) for number, item in enumerate(node.value)]
        return self.loader.construct_object(node)

    def _mapping(self, node: Any, place: tuple[str, ...]) -> dict[str, object]:
        found: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = {**self._merged(value_node, place, line), **merged}
                continue
            key = str(self.value(key_node, (*place, "?")))
            if key in found:
                raise ConfigError(f"{self.path}, line {line}: the key {key!r} stands twice in one mapping; remove one")
            where = (*place, key)
            self.lines[where] = line
            found[key] = self.value(value_node, where)
        return {**merged, **found}

    def _merged(self, node: Any, place: tuple[str, ...], line: int) -> dict[str, object]:
        """What ``<<`` brings in. Of several mappings the first one wins."""
        found: dict[str, object] = {}
        for part in node.value if node.id == "sequence" else [node]:
            value = self.value(part, (*place, "<<"))
            if not isinstance(value, dict):
                raise ConfigError(f"{self.path}, line {line}: << takes mappings only; correct it")
            found = {**value, **found}
        return found


def _inside(folder: str) -> str:
    found = sorted(str(file) for suffix in ("json", "yaml", "yml") for file in Path(folder).glob(f"*.{suffix}"))
    return f"; it holds {', '.join(found[:5])}" if found else ""


def _beside(path: str) -> str:
    from difflib import get_close_matches

    try:
        names = [file.name for file in Path(path).parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(Path(path).name, names, 1)
    return f"; did you mean {Path(path).with_name(near[0])}?" if near else ""
