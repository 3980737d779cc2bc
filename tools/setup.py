"""Sets up what `make` needs inside the checkout, once: `python tools/setup.py test|demo`.

    .venv        torch 2.13.0, the tools of the test suite, trainfix itself (editable)
    .venv/demo   a thin environment that sees .venv and adds DeepSpeed 0.18.9

DeepSpeed has an environment of its own because the tests lay every release over .venv, one at a time.
Each part writes a stamp when it is complete; a stamp that matches makes this script return at once.
`TORCH_INDEX=URL` names the package index that torch comes from.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
BASE = CHECKOUT / ".venv"
DEMO = BASE / "demo"
TORCH = "torch==2.13.0"
TORCH_PUBLIC_INDEX = "https://download.pytorch.org/whl/cpu"
DEEPSPEED = "deepspeed==0.18.9"
BUILD_TOOLS = ("setuptools", "wheel", "ninja", "hatchling>=1.26")


class SetupError(Exception):
    """A part of the environment could not be installed. The message says what to do."""


def python_of(environment: Path) -> str:
    """The interpreter of a virtual environment."""
    return str(environment / "bin" / "python")


def succeeds(command: list[str]) -> bool:
    """Whether a command starts and exits with 0; what it prints is dropped."""
    try:
        return subprocess.run(command, cwd=CHECKOUT, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def runs(environment: Path) -> bool:
    """Whether the environment's interpreter starts and is of the version that runs this."""
    check = f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}"
    return succeeds([python_of(environment), "-c", check])


def pip_install(environment: Path, *arguments: str, **variables: str) -> bool:
    """`pip install` in one environment; False when pip failed, after it has said why."""
    command = [python_of(environment), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    return subprocess.run(command, cwd=CHECKOUT, env=settings | variables, check=False).returncode == 0


def require(installed: bool, what: str) -> None:
    """Raise SetupError when `what` could not be installed."""
    if not installed:
        raise SetupError(
            f"{what} could not be installed into {BASE.name} (pip's own message is above). Check that the package "
            "index which pip is configured for can be reached (python -m pip config list), then run make again."
        )


def install_torch() -> None:
    """torch 2.13.0 from TORCH_INDEX, else from pip's configured find-links, else from PyTorch's public CPU index.

    Plain PyPI is no candidate: on Linux x86-64 it offers this release as a CUDA build of several gigabytes.
    """
    check = f"import importlib.metadata as m; assert m.version('torch').split('+')[0] == '{TORCH.split('==')[1]}'"
    index = os.environ.get("TORCH_INDEX")
    present = succeeds([python_of(BASE), "-c", check])
    if not present and not index:
        present = succeeds([python_of(BASE), "-m", "pip", "install", "--no-deps", "--no-index", TORCH])
    if not present and not pip_install(BASE, "--no-deps", "--index-url", index or TORCH_PUBLIC_INDEX, TORCH):
        raise SetupError(
            f"{TORCH} could not be installed from {index or TORCH_PUBLIC_INDEX} (pip's own message is above). "
            "Name an index that has it with TORCH_INDEX=URL, or a folder that holds its wheel with PIP_FIND_LINKS."
        )
    require(pip_install(BASE, TORCH), "what torch requires")


def set_up_base() -> None:
    """.venv with torch and the tools that build wheels; made anew when the checkout moved or Python changed."""
    made_for, marker = "{} {}.{}".format(CHECKOUT, *sys.version_info), BASE / ".made-for"
    moved = marker.is_file() and marker.read_text(encoding="utf-8") != made_for
    if moved or not runs(BASE):
        venv.create(BASE, clear=True, with_pip=True)
    marker.write_text(made_for, encoding="utf-8")
    install_torch()
    require(pip_install(BASE, *BUILD_TOOLS), "the build tools")


def set_up_test() -> None:
    """.venv with everything that lint, types and the test suite use."""
    require(pip_install(BASE, "--no-build-isolation", "--editable", ".[test]"), "trainfix[test]")


def set_up_demo() -> None:
    """.venv/demo with DeepSpeed 0.18.9, built without compiled operators, and trainfix."""
    if not runs(DEMO):
        venv.create(DEMO, clear=True, with_pip=False)
    site = "lib/python{}.{}/site-packages".format(*sys.version_info)
    (DEMO / site / "shared.pth").write_text(f"import site; site.addsitedir({str(BASE / site)!r})\n", encoding="utf-8")
    pure = pip_install(DEMO, "--no-deps", "--no-build-isolation", DEEPSPEED, DS_BUILD_OPS="0")
    require(pure, DEEPSPEED)
    require(pip_install(DEMO, "--no-build-isolation", "--editable", ".[demo]"), "trainfix[demo]")


PARTS: dict[str, tuple[Path, Callable[[], None]]] = {
    "base": (BASE, set_up_base),
    "test": (BASE, set_up_test),
    "demo": (DEMO, set_up_demo),
}


def inputs() -> str:
    """A digest of all that decides what gets installed: when it changes, every part is looked at again."""
    described = [sys.version, str(CHECKOUT)]
    described += [(CHECKOUT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "tools/setup.py")]
    return hashlib.sha256("\0".join(described).encode()).hexdigest()


def ensure(part: str) -> None:
    """Install one part unless its stamp says that it is complete."""
    folder, work = PARTS[part]
    stamp = folder / f".{part}.stamp"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == inputs():
        return
    print(f"setting up {part} in {folder.relative_to(CHECKOUT)} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    work()
    stamp.write_text(inputs(), encoding="utf-8")
    print(f"setting up {part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    """Set up the part that is named on the command line, after the base that it needs."""
    parser = argparse.ArgumentParser(description="Set up the environment of `make test` or `make demo`.")
    parser.add_argument("part", choices=["test", "demo"])
    part = parser.parse_args().part
    try:
        ensure("base")
        ensure(part)
    except SetupError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
