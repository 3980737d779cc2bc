"""TRAINFIX and TRAINFIX_*: environment variables -> one frozen Settings.

Read once, when trainfix is imported; nothing heavy is imported here, not even ``typing``.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Every id of the catalogue; tests/advisories keeps this equal to the records.
# fmt: off
ADVISORY_IDS = (
    "TF-0001", "TF-0002", "TF-0003", "TF-0004", "TF-0005", "TF-0006", "TF-0007", "TF-0008",
    "TF-0009", "TF-0010", "TF-0011", "TF-0012", "TF-0013", "TF-0014", "TF-0015", "TF-0016",
    "TF-0017", "TF-0018", "TF-0019", "TF-0020", "TF-0021", "TF-0022", "TF-0023", "TF-0024",
    "TF-0025", "TF-0026", "TF-0027", "TF-0028", "TF-0029", "TF-0030", "TF-0031", "TF-0032",
    "TF-0033", "TF-0034", "TF-0035", "TF-0036", "TF-0037", "TF-0038", "TF-0039", "TF-0040",
    "TF-0041", "TF-0042", "TF-0043", "TF-0044",
    "TF-0101", "TF-0102", "TF-0103", "TF-0104", "TF-0105", "TF-0106",
    "TF-0201", "TF-0202", "TF-0203", "TF-0204", "TF-0205",
    "TF-0301", "TF-0302", "TF-0303",
    "TF-0401", "TF-0402", "TF-0403", "TF-0404", "TF-0405", "TF-0406", "TF-0407", "TF-0408",
    "TF-0409", "TF-0410", "TF-0411",
    "TF-0501",
    "TF-0601", "TF-0602",
)
# fmt: on
MODES = ("on", "off", "warn", "strict")
GRADCOPY = ("auto", "resident", "ring", "host-add", "torch")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ACTIONS = ("warn", "stop")
VARIABLES = (
    "TRAINFIX",
    "TRAINFIX_DISABLE",
    "TRAINFIX_GRADCOPY",
    "TRAINFIX_GRADCOPY_BUDGET",
    "TRAINFIX_LEDGER",
    "TRAINFIX_OVERLAP",
    "TRAINFIX_QUIET",
    "TRAINFIX_STAMP",
)


class SettingsError(ValueError):
    """A TRAINFIX variable has a value that means nothing. The message lists the valid ones."""


class Ledger:
    """Which windows the ledger audits, what it does about one that does not balance, and where its records go.

    first: the first windows; every: and two in a row at every so many, 0 for none; action: warn or stop; out: a folder,
    None for no records.
    """

    __slots__ = ("action", "every", "first", "out")

    def __init__(self, *, first: int = 2, every: int = 0, action: str = "warn", out: str | None = None) -> None:
        self.first, self.every, self.action, self.out = first, every, action, out

    def __repr__(self) -> str:
        return f"Ledger(first={self.first}, every={self.every}, action={self.action!r}, out={self.out!r})"


class Settings:
    """What the environment asks for. `disabled` holds advisory ids; `gradcopy` is the tier that carries offloaded
    gradients, with `gradcopy_budget` bytes on the device (None: what is free), `overlap`: beside the backward pass;
    `ledger`: what it audits, None for nothing; `quiet` silences the summary lines only; `stamp`: checkpoints of
    repaired runs say so; `unknown` holds TRAINFIX_* variables that do not exist."""

    __slots__ = ("disabled", "gradcopy", "gradcopy_budget", "ledger", "mode", "overlap", "quiet", "stamp", "unknown")
    mode: str
    disabled: frozenset[str]
    gradcopy: str
    gradcopy_budget: int | None
    ledger: Ledger | None
    overlap: bool
    quiet: bool
    stamp: bool
    unknown: tuple[str, ...]

    def __init__(
        self,
        *,
        mode: str = "on",
        disabled: frozenset[str] = frozenset(),
        gradcopy: str = "auto",
        gradcopy_budget: int | None = None,
        ledger: Ledger | None = None,
        overlap: bool = True,
        quiet: bool = False,
        stamp: bool = True,
        unknown: tuple[str, ...] = (),
    ) -> None:
        values = (disabled, gradcopy, gradcopy_budget, ledger, mode, overlap, quiet, stamp, unknown)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Settings are frozen: cannot set {name}")


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment (default ``os.environ``). Raises SettingsError for an unknown value or id."""
    environ = os.environ if environ is None else environ
    mode = environ.get("TRAINFIX", "").strip().lower() or "on"
    if mode not in MODES:
        raise SettingsError(f"TRAINFIX={environ['TRAINFIX']!r} means nothing; valid: {', '.join(MODES)}")
    asked = [part.strip().upper() for part in environ.get("TRAINFIX_DISABLE", "").split(",") if part.strip()]
    for part in asked:
        if part not in ADVISORY_IDS and not is_of_third_party(part):
            raise SettingsError(f"TRAINFIX_DISABLE names {part!r}, no such advisory; valid: {', '.join(ADVISORY_IDS)}")
    gradcopy = environ.get("TRAINFIX_GRADCOPY", "").strip().lower() or "auto"
    if gradcopy not in GRADCOPY:
        raise SettingsError(
            f"TRAINFIX_GRADCOPY={environ['TRAINFIX_GRADCOPY']!r} means nothing; valid: {', '.join(GRADCOPY)}"
        )
    return Settings(
        mode=mode,
        disabled=frozenset(asked),
        gradcopy=gradcopy,
        gradcopy_budget=_bytes(environ, "TRAINFIX_GRADCOPY_BUDGET"),
        ledger=_ledger(environ),
        overlap=_flag(environ, "TRAINFIX_OVERLAP", "1"),
        quiet=_flag(environ, "TRAINFIX_QUIET", "0"),
        stamp=_flag(environ, "TRAINFIX_STAMP", "1"),
        unknown=tuple(sorted(name for name in environ if name.startswith("TRAINFIX_") and name not in VARIABLES)),
    )


def is_of_third_party(id: str) -> bool:
    """Whether an advisory id may be one of a third party's fix: ``ACME-0001``. Who has it is known once torch is."""
    prefix, _, number = id.partition("-")
    is_prefix = prefix[:1].isalpha() and prefix.isalnum() and prefix.isupper() and prefix != "TF"
    return id.isascii() and is_prefix and number.isdecimal() and len(number) < 10


def _flag(environ: Mapping[str, str], variable: str, default: str) -> bool:
    value = environ.get(variable, "").strip() or default
    if value not in ("0", "1"):
        raise SettingsError(f"{variable}={value!r} means nothing; valid: 0, 1")
    return value == "1"


def _ledger(environ: Mapping[str, str]) -> Ledger | None:
    """``first:2,every:500,action=warn,out=DIR``, any of them, in any order but `out`, which goes on to the end."""
    value = environ.get("TRAINFIX_LEDGER", "").strip()
    if value in ("", "0"):
        return None
    rest, _, out = ("," + value).replace(",out:", ",out=").partition(",out=")
    found: dict[str, str] = {}
    for part in rest.split(","):
        if part.strip() and part.strip() != "1":
            key, _, word = part.strip().replace("=", ":", 1).partition(":")
            found[key.strip()] = word.strip()
    counts = {key: int(found.pop(key)) for key in ("first", "every") if found.get(key, "").isdecimal()}
    action = found.pop("action", "warn")
    if found or action not in ACTIONS or not any({"first": 2, **counts}.values()):
        wrong = next(iter(found), "action" if action not in ACTIONS else "first")
        raise SettingsError(
            f"TRAINFIX_LEDGER={value!r} means nothing at {wrong!r}; valid: 1, or any of first:WINDOWS, every:WINDOWS, "
            "action=warn|stop, out=FOLDER, with commas between, out last: first:2,every:500,action=warn,out=ledger"
        )
    return Ledger(**counts, action=action, out=out.strip() or None)


def _bytes(environ: Mapping[str, str], variable: str) -> int | None:
    """``8GiB``, ``500 MB``, ``0`` or a number of bytes."""
    value = environ.get(variable, "").strip()
    if not value:
        return None
    number = value.rstrip("KMGTIBkmgtib ")
    unit = value[len(number) :].strip().upper()
    try:
        size = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        size = -1.0
    if not 0 <= size < 2**63:
        raise SettingsError(f"{variable}={value!r} means nothing; valid: bytes, such as 0, 500MB or 8GiB")
    return int(size)
