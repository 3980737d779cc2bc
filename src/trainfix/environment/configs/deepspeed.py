"""DeepSpeed's own JSON config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainfix.environment.configs.documents import Document
from trainfix.environment.configs.draft import Draft

KIND = "deepspeed"


def recognises(document: Document) -> bool:
    """A JSON object that is nobody else's."""
    return bool(document.text.lstrip().startswith("{")) and not document.path.lower().endswith((".yaml", ".yml"))


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a DeepSpeed config."""
    draft = Draft(document, KIND, "deepspeed")
    draft.put("deepspeed", True, text=f"{document.path} is a DeepSpeed config")
    for key, value in flat(document.content):
        draft.put(key, value)
    return (draft,)


def flat(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Flat dotted keys. An empty section stays as a value, so that its presence is seen."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
