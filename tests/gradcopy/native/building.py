"""Building the optional distribution `trainfix-native` outside the checkout, for tests and benchmarks."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "native"


def compiler() -> list[str] | None:
    """The C compiler that Python's own build configuration or CC names, as a command; None where it is missing."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return command if shutil.which(command[0]) else None


def lacks() -> str | None:
    """What this machine lacks to build it, else None."""
    if compiler() is None:
        return "no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python headers"
    return None


def copy(folder: Path) -> Path:
    """A copy of the sources in `folder`: building writes beside them."""
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(SOURCES, folder / "native", ignore=ignored))


def build(folder: Path, *flags: str) -> Path:
    """Build it with these compiler flags before its own; the folder to put on the path.

    Raises RuntimeError with what the compiler said.
    """
    library = folder / "library"
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={folder / 'work'}", f"--build-lib={library}"]
    environment = os.environ | {"CFLAGS": " ".join(flags)}
    done = subprocess.run(command, cwd=copy(folder), env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return library


@contextmanager
def found(folder: Path) -> Iterator[None]:
    """Let imports find the built package in `folder`, before an installed one."""
    kept: Mapping[str, object] = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
    sys.path.insert(0, str(folder))
    invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)  # type: ignore[arg-type]


def _ours(name: str) -> bool:
    return name.partition(".")[0] == "trainfix_native"
