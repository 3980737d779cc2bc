"""Stacks: released packages laid over the shared test environment, each unpacked once into the user's cache.

`stack(transformers="4.45.2", accelerate="1.0.1")` is a list of folders for PYTHONPATH. What a package needs in another
version than the test environment has (transformers' tokenizers and huggingface_hub) comes along. DeepSpeed's releases
are built; see tests.support.releases.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.version import Version

from tests.support.releases import ReleaseUnavailable, _lock, _pip, cache_folder, release

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

# transformers 4.42 asks the metadata whether numpy is older than 2, and runs with numpy 2 all the same.
_NUMPY_1 = Path(__file__).with_name("numpy_1")

# From this transformers release on -> what it wants. None: what the test environment has.
_COMPANIONS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("4.41.0", {"tokenizers": "0.19.1", "huggingface_hub": "0.36.2", "accelerate": "1.0.1"}),
    ("4.45.0", {"tokenizers": "0.20.3", "huggingface_hub": "0.36.2", "accelerate": "1.0.1"}),
    ("4.47.0", {"tokenizers": "0.21.4", "huggingface_hub": "0.36.2", "accelerate": "1.7.0"}),
    ("4.54.0", {"tokenizers": "0.21.4", "huggingface_hub": "0.36.2", "accelerate": "1.11.0"}),
    ("4.56.0", {"tokenizers": "0.22.2", "huggingface_hub": "0.36.2", "accelerate": "1.11.0"}),
    ("5.0.0", {"tokenizers": "0.22.2", "huggingface_hub": "1.33.0", "accelerate": "1.11.0"}),
    ("5.16.0", {"tokenizers": "0.23.3", "huggingface_hub": "1.33.0", "accelerate": "1.15.0"}),
)


def stack(**packages: str) -> list[Path]:
    """The folders that hold these releases (``transformers="4.45.2"``), installed into the cache where they are not.

    Names are those of the Python packages, which pip understands too. An explicit companion wins over the table's.
    Raises ReleaseUnavailable, with pip's last words.
    """
    wanted = {**_companions(packages.get("transformers")), **packages}
    stand_ins = [_NUMPY_1] if packages.get("transformers", "").startswith("4.42.") else []
    return [*stand_ins, *(folder(name, version) for name, version in wanted.items())]


def environment(*folders: Path, trainfix: bool) -> dict[str, str]:
    """The variables for a child that imports from these folders, offline, on the CPU, with trainfix on or off."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TRAINFIX", "PYTHON"))}
    return inherited | {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (*folders, SOURCE, ROOT)),
        "PYTHONWARNINGS": "ignore",
        "TRAINFIX": "on" if trainfix else "off",
        "WANDB_DISABLED": "true",
    }


def _companions(transformers: str | None) -> Mapping[str, str]:
    if transformers is None:
        return {}
    fitting = [wants for since, wants in _COMPANIONS if Version(transformers) >= Version(since)]
    if not fitting:
        raise ValueError(f"transformers {transformers} is older than any that the tests run ({_COMPANIONS[0][0]})")
    return fitting[-1]


def folder(name: str, version: str) -> Path:
    """The folder that holds one release of one package."""
    if name == "deepspeed":
        return release(version)
    place = cache_folder() / f"{name}-{version}"
    if place.is_dir():
        return place
    with _lock(place.name):
        if not place.is_dir():
            _install(name, version, place)
    return place


def _install(name: str, version: str, place: Path) -> None:
    """Install into a neighbour and rename it, so that the folder is complete whenever it exists."""
    unfinished = place.with_suffix(f"{place.suffix}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _pip(Path(sys.executable), "--no-deps", "--no-compile", "--target", str(unfinished), f"{name}=={version}")
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


__all__ = ["ReleaseUnavailable", "environment", "folder", "stack"]
