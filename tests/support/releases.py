"""The DeepSpeed releases that the tests run, each unpacked once into the user's cache and laid over with PYTHONPATH.

`python -m tests.support.releases [VERSION...]` fills the cache, with all releases by default.
The folders outlive the checkout: <cache>/trainfix/releases/deepspeed-<version>/.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_BANDS = {"0.14": 5, "0.15": 4, "0.16": 9, "0.17": 6, "0.18": 9, "0.19": 8}  # minor release: its last patch release
RELEASES = tuple(f"{minor}.{patch}" for minor, last in _BANDS.items() for patch in range(last + 1))

# What DeepSpeed's setup.py imports, but for torch: without torch it takes the pure-Python way, in 2 s instead of 12.
# setuptools 82 dropped pkg_resources, which the older releases import.
_INSTALLER_REQUIREMENTS = ("setuptools<82", "wheel", "ninja", "packaging", "psutil", "py-cpuinfo", "hjson")
_LAST_LINES = 8


class ReleaseUnavailable(Exception):
    """A release could not be installed. The message has pip's last words and the next step."""


def cache_folder() -> Path:
    """Where releases are kept: XDG_CACHE_HOME or ~/.cache, then trainfix/releases."""
    caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(caches) / "trainfix" / "releases"


def release(version: str) -> Path:
    """The folder that holds DeepSpeed `version`, installed into the cache when it is not there yet."""
    if version not in RELEASES:
        raise ValueError(f"deepspeed {version} is not one of the releases under test: {', '.join(RELEASES)}")
    folder = cache_folder() / f"deepspeed-{version}"
    if folder.is_dir():
        return folder
    with _lock(folder.name):
        if not folder.is_dir():
            _install(version, folder)
    return folder


def _install(version: str, folder: Path) -> None:
    """Install into a neighbour of `folder` and rename it, so that `folder` is complete whenever it exists."""
    installer = _installer()
    unfinished = folder.with_suffix(f"{folder.suffix}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--target", str(unfinished)]
    try:
        _pip(installer, *options, f"deepspeed=={version}")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _installer() -> Path:
    """The interpreter of a small environment without torch that builds the releases."""
    folder = cache_folder() / "installer-{}.{}".format(*sys.version_info)
    python, stamp = folder / "bin" / "python", folder / "complete"
    with _lock(folder.name):
        if not stamp.exists():
            venv.create(folder, clear=True, with_pip=True)
            _pip(python, *_INSTALLER_REQUIREMENTS)
            stamp.touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    variables.pop("PYTHONPATH", None)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=variables | {"DS_BUILD_OPS": "0"}, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:])
    raise ReleaseUnavailable(
        f"pip could not install {' '.join(arguments)}:\n{words}\nCheck that the package index pip is configured for "
        f"can be reached (python -m pip download --no-deps {arguments[-1]}), then run: python -m tests.support.releases"
    )


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """One process at a time. The lock ends with its holder, however that ends."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / f".{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main(versions: list[str]) -> int:
    """Fill the cache, two releases at a time."""
    wanted = versions or RELEASES
    missing = [version for version in wanted if not (cache_folder() / f"deepspeed-{version}").is_dir()]
    try:
        with ThreadPoolExecutor(max_workers=2) as pool:
            for done, folder in enumerate(pool.map(release, missing), start=1):
                print(f"{done} of {len(missing)}: {folder.name}", file=sys.stderr, flush=True)
    except (ReleaseUnavailable, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"{len(wanted)} releases in {cache_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
