"""What one file says of a run, before it is joined with the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainfix.environment.configs.documents import Document
from trainfix.environment.runconfig import Origin, shown

Role = Literal["deepspeed", "launcher", "program"]


@dataclass(eq=False)
class Draft:
    """What a reader has found in one document.

    role: a DeepSpeed config; a launcher's (accelerate), which may start any program; or that of the program itself.
    values: under the keys of `runconfig`, what holds in this run. A DeepSpeed config of the run decides first.
    fills: what the program puts where the DeepSpeed config says "auto", and only there.
    assumed: what holds where no file of the run sets the key.
    deepspeed, accelerate: the config that this one refers to, a path as written there, or the config itself: a section
    of this document, or a draft where the program builds it.
    Each value is an `Open` where the document leaves it open. Every key has its origin.
    """

    document: Document
    kind: str
    role: Role
    values: dict[str, object] = field(default_factory=dict)
    fills: dict[str, object] = field(default_factory=dict)
    assumed: dict[str, object] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    deepspeed: str | dict[str, object] | Draft | None = None
    accelerate: str | Draft | None = None

    @property
    def source(self) -> str:
        """The file as the user typed it."""
        return self.document.path

    def put(self, key: str, value: object, *written: str, text: str = "") -> None:
        """`key` of the run is `value`, which the document says at the key path `written` (default: `key`, split)."""
        self.values[key] = value
        self.origins[key] = self.place(*(written or tuple(key.split("."))), text=text)

    def fill(self, key: str, value: object, *written: str, text: str = "") -> None:
        """`value` is put where DeepSpeed's config says "auto" for `key`."""
        self.fills[key] = value
        self.origins.setdefault(key, self.place(*written, text=text))

    def assume(self, key: str, value: object, who: str, name: str = "") -> None:
        """`key`, which the document would call `name`, is not set here; `who`, then, takes `value`."""
        self.assumed[key] = value
        text = f"{name or key} is not set ({self.source}): {who} takes {shown(value)}"
        self.origins.setdefault(key, Origin(self.source, key, text=text))

    def place(self, *written: str, text: str = "") -> Origin:
        """Where a key path stands in the document."""
        return Origin(self.source, ".".join(written), self.document.line(*written), text)
