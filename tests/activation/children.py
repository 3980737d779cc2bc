"""Child interpreters that import a package which trainfix repairs, and say whether trainfix is active in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import trainfix
from trainfix.activation import BOOTSTRAP, INSIDE

SOURCE = Path(trainfix.__file__).parents[1]

ACTIVE = "any(type(finder).__module__ == 'trainfix.engine.finder' for finder in __import__('sys').meta_path)"
"""An expression for a child: whether the engine's finder is in place."""

SAY = f"import trl; print('active' if {ACTIVE} else 'not active')"
"""A script that imports a package to repair and says what it finds."""


def package(folder: Path) -> Path:
    """A folder with an empty package under the name of one that is repaired."""
    (folder / "trl").mkdir(parents=True)
    (folder / "trl" / "__init__.py").touch()
    return folder


def without_trainfix(*folders: Path, **variables: str) -> dict[str, str]:
    """The variables for a child: these folders on PYTHONPATH, and nothing of ours inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRAINFIX", "PYTHON"))}
    path = {"PYTHONPATH": os.pathsep.join(map(str, folders))} if folders else {}
    return inherited | path | variables


def below_run(*command: object, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``trainfix run -- COMMAND``."""
    words = [sys.executable, "-m", "trainfix", "run", "--", *map(str, command)]
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


def python(*words: object, env: dict[str, str], program: str | Path = sys.executable) -> str:
    """What an interpreter prints, which must end well and say nothing on stderr."""
    done = subprocess.run([program, *map(str, words)], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def environment(folder: Path, *, wheel: bool = False) -> tuple[Path, Path]:
    """A virtual environment with trainfix in it, linked to or copied as a wheel has it: its python, its site-packages.

    What trainfix requires is linked to.
    """
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if wheel:
        shutil.copytree(SOURCE / "trainfix", site / "trainfix", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (site / "_trainfix.pth").write_text(f"{SOURCE}\n")
    for requirement in ("packaging", "wrapt"):
        (site / requirement).symlink_to(Path(__import__(requirement).__file__).parent)
    return folder / "bin" / "python", site


__all__ = ["ACTIVE", "BOOTSTRAP", "INSIDE", "SAY", "SOURCE"]
