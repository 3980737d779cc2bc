"""What the engine says, and to whom: the logger ``trainfix``, or stderr when nobody listens to it."""

from __future__ import annotations

import os
import sys

_said: set[str] = set()


def is_first_rank() -> bool:
    """Whether this process is the first rank, judged by the launcher's variables, never by torch."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        value = os.environ.get(name)
        if value is not None:
            return value.strip() == "0"
    return True


def inform(text: str) -> None:
    """One INFO line on the first rank."""
    if is_first_rank():
        _say("info", text)


def warn(text: str, *, every_rank: bool = False) -> None:
    """One WARNING line, once per process; on the first rank only unless `every_rank`."""
    if text not in _said and (every_rank or is_first_rank()):
        _said.add(text)
        _say("warning", text)


def _say(level: str, text: str) -> None:
    # Without a handler Python swallows INFO lines, so they go to stderr directly; without the module, nobody can
    # have one.
    logging = sys.modules.get("logging")
    if logging is not None:
        logger = logging.getLogger("trainfix")
        if logger.handlers or logging.getLogger().handlers:
            logger.log(getattr(logging, level.upper()), text)
            return
    sys.stderr.write(f"{text}\n")


def warn_unknown_variable(variable: str) -> None:
    from difflib import get_close_matches

    from trainfix.settings import VARIABLES

    nearest = get_close_matches(variable, VARIABLES, 1, 0.0)[0]
    warn(f"trainfix: {variable} is not a variable that trainfix knows; did you mean {nearest}?")
