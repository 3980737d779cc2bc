"""``trainfix enable`` and ``trainfix disable``: activation of a whole environment, by a start-up file in it.

The file is a ``.pth`` file and never part of the wheel. PEP 829's ``.start`` files, which replace the code in ``.pth``
files from Python 3.15 on, are left out: none of the Pythons that trainfix is tested with reads them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

REFUSED = 1
_INSTEAD = "use `trainfix run -- COMMAND`, which writes nothing"

# It looks for trainfix anew at every start, so that it survives upgrades, a move of the environment, and an uninstall,
# after which it does nothing. Python runs it twice at the start of a virtual environment's interpreter.
_CODE = """\
try:
 for p in sys.path if '_trainfix_waiting' not in sys.modules else ():
  p = os.path.join(p, 'trainfix', 'activation', 'bootstrap')
  if os.path.isfile(os.path.join(p, '_trainfix_waiting.py')):
   sys.path.insert(0, p)
   try: import _trainfix_waiting
   finally: sys.path.remove(p)
   break
except Exception as e:
 sys.modules['_trainfix_waiting'] = None
 sys.stderr and sys.stderr.write('trainfix: not active in this process: %r\\n' % e)
"""
LINE = f"import os, sys; exec({_CODE!r})\n"
"""The start-up file: Python runs a line of a ``.pth`` file that begins with ``import``."""


class _Refused(Exception):
    """Nothing was done. The message says why, and what to do."""


def options(parser: argparse.ArgumentParser) -> None:
    """Both commands take nothing."""
    parser.epilog = "Exit codes: 0 done, or nothing to do; 1 refused, and nothing was changed; 2 usage."


def enable(args: argparse.Namespace) -> int:
    """Write the start-up file into this environment, and say so."""
    return _report(_enable)


def disable(args: argparse.Namespace) -> int:
    """Remove the start-up file from this environment, and say so."""
    return _report(_disable)


def _report(act: Callable[[], str]) -> int:
    try:
        print(act())
    except _Refused as refused:
        print(f"trainfix: {refused}", file=sys.stderr)
        return REFUSED
    return 0


def _enable() -> str:
    file = start_file()
    _check(os.path.dirname(file))
    before = _content(file)
    if before == LINE:
        return f"already enabled: {file} is as it should be"
    _write(file)
    done = "wrote" if before is None else "renewed"
    return (
        f"{done} {file}:\n{LINE}"
        "From now on every Python of this environment repairs what it imports, as `import trainfix` does; "
        "TRAINFIX=off switches it off for one run, `trainfix disable` removes the file."
    )


def _disable() -> str:
    file = start_file()
    try:
        os.unlink(file)
    except FileNotFoundError:
        return f"nothing to remove: there is no {file}"
    except OSError as error:
        raise _Refused(f"{file} cannot be removed ({error.strerror}); remove it yourself") from None
    return f"removed {file}: trainfix is active only where a script imports it, or below `trainfix run`"


def start_file() -> str:
    """Where the start-up file of the running interpreter's environment is or would be."""
    import sysconfig

    from trainfix.activation.found import START_FILE

    return os.path.join(sysconfig.get_path("purelib"), START_FILE)


def _check(site: str) -> None:
    """Raise _Refused unless this is an environment of the user's own that can be written to and holds trainfix."""
    import sysconfig

    from trainfix.activation.found import holds_trainfix

    if sys.prefix == sys.base_prefix:
        marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")  # PEP 668
        if os.path.isfile(marker):
            raise _Refused(f"{sys.prefix} is managed by the system ({marker} says so): {_INSTEAD}, or enable a venv")
        if not os.path.isdir(os.path.join(sys.prefix, "conda-meta")):
            raise _Refused(
                f"{sys.prefix} is neither a virtual nor a conda environment, and a start-up file there would "
                f"concern every program that uses this Python: {_INSTEAD}, or enable a venv"
            )
    if not holds_trainfix([site]):
        raise _Refused(f"trainfix is not installed in {site}: install it there first, or {_INSTEAD}")
    if not os.access(site, os.W_OK):
        raise _Refused(f"{site} cannot be written: {_INSTEAD}")


def _content(file: str) -> str | None:
    """What stands in the start-up file, None if there is none."""
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            return opened.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Refused(f"{file} cannot be read ({error.strerror}): remove it, or {_INSTEAD}") from None


def _write(file: str) -> None:
    """The whole file, by renaming a complete one into place."""
    draft = f"{file}.{os.getpid()}.tmp"
    try:
        with open(draft, "w", encoding="utf-8") as opened:
            opened.write(LINE)
        os.replace(draft, file)
    except OSError as error:
        if os.path.exists(draft):
            os.unlink(draft)
        raise _Refused(f"{file} cannot be written ({error.strerror}): {_INSTEAD}") from None


COMMANDS = (
    ("enable", "activate trainfix in every Python of this environment", options, enable),
    ("disable", "undo `trainfix enable`", options, disable),
)
