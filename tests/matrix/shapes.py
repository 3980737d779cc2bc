"""``python -m tests.matrix.shapes [--wheels FOLDER] [PACKAGE...]``: the shapes that decide, in every release there is.

For each function that the record or the repair of a loss looks at, docs/loss-shapes.json has its shape in each release,
from the text in the wheel. Wheels that FOLDER lacks are downloaded into it (default: a temporary folder).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from packaging.version import Version

from tests.matrix import PACKAGE as DEEPSPEED
from tests.matrix import ROOT
from trainfix import advisories
from trainfix.advisories import Advisory
from trainfix.engine.decide import load_fix, targets_of
from trainfix.environment.shapes import ABSENT, shape_in_text

TABLE = ROOT / "docs" / "loss-shapes.json"

# The oldest release that is looked at: where the oldest error begins that we know, or what the others are used with.
SINCE: Mapping[str, str] = {
    "accelerate": "0.29.3",
    "llamafactory": "0.8.0",
    "openrlhf": "0.5.0",
    "torchao": "0.5.0",
    "transformers": "4.41.0",
    "trl": "0.9.3",
}

Shapes = dict[str, dict[str, str]]
"""Release, oldest first -> function -> shape."""


def known() -> list[Advisory]:
    """Every advisory of another package than DeepSpeed."""
    return [advisory for advisory in advisories.load_all() if advisory.package != DEEPSPEED]


def looked_at(advisory: Advisory) -> tuple[str, ...]:
    """The functions whose shapes decide about one advisory."""
    if advisory.fix is None:
        return tuple(advisory.evidence)
    return targets_of(load_fix(advisory.fix), [advisory])


def functions() -> dict[str, list[str]]:
    """Package -> its functions whose shapes decide about anything."""
    found: dict[str, set[str]] = {}
    for advisory in known():
        for path in looked_at(advisory):
            found.setdefault(path.partition(".")[0], set()).add(path)
    return {package: sorted(paths) for package, paths in sorted(found.items())}


@lru_cache
def load() -> dict[str, Shapes]:
    """The committed table: package -> release -> function -> shape."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return {package: _unpacked(**packed) for package, packed in table.items()}


def _unpacked(releases: list[str], functions: Mapping[str, list[str]]) -> Shapes:
    shapes: Shapes = {release: {} for release in releases}
    for path, bands in functions.items():
        for shape, first, last in map(str.split, bands):
            for release in releases[releases.index(first) : releases.index(last) + 1]:
                shapes[release][path] = shape
    return shapes


def _packed(shapes: Shapes) -> dict[str, object]:
    """``shape first last`` for each run of releases that share a function's shape."""
    bands: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for of_release in shapes.values() for path in of_release):
        for shape, group in groupby(shapes, key=lambda release: shapes[release][path]):
            releases = list(group)
            bands.setdefault(path, []).append(f"{shape} {releases[0]} {releases[-1]}")
    return {"releases": list(shapes), "functions": bands}


def of_text(texts: Mapping[str, str], paths: list[str]) -> dict[str, str]:
    """The shape of each function; `texts` maps a module to its source, and lacks one that is not there."""
    shapes = {}
    for path in paths:
        module, _, qualname = path.partition(":")
        shapes[path] = (shape_in_text(texts[module], qualname) if module in texts else None) or ABSENT
    return shapes


def in_folder(folder: Path, paths: list[str]) -> dict[str, str]:
    """The shapes in an installed copy."""
    texts = {}
    for module in {path.partition(":")[0] for path in paths}:
        for file in _files(module):
            if (folder / file).is_file():
                texts[module] = (folder / file).read_text(encoding="utf-8")
    return of_text(texts, paths)


def in_wheel(wheel: Path, paths: list[str]) -> dict[str, str]:
    """The shapes in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".data/purelib/")[2] or name: name for name in archive.namelist()}
        texts = {
            module: archive.read(names[file]).decode()
            for module in {path.partition(":")[0] for path in paths}
            for file in _files(module)
            if file in names
        }
    return of_text(texts, paths)


def _files(module: str) -> tuple[str, str]:
    path = module.replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


def on_index(package: str) -> list[str]:
    """The final releases on the index that are looked at, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", package]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Available versions:"))
    found = sorted(line.partition(":")[2].replace(",", " ").split(), key=Version)
    return [one for one in found if Version(one) >= Version(SINCE[package])]


def _wheels(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for release in on_index(package):
        if not (found := sorted(folder.glob(f"{package}-{release}-*.whl"))):
            options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
            command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={release}"]
            if subprocess.run(command, check=False).returncode != 0:
                print(f"{package} {release} has no wheel for this Python", file=sys.stderr)
                continue
            found = sorted(folder.glob(f"{package}-{release}-*.whl"))
        yield release, found[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.shapes", description=__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="look at these (default: all)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="where wheels are, and where new ones are kept")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    wanted = functions()
    with tempfile.TemporaryDirectory() as temporary:
        for package in options.packages or wanted:
            wheels = _wheels(package, options.wheels or Path(temporary))
            table[package] = _packed({release: in_wheel(wheel, wanted[package]) for release, wheel in wheels})
            print(f"{package}: {len(table[package]['releases'])} releases", file=sys.stderr)
    TABLE.write_text(json.dumps({package: table[package] for package in wanted if package in table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
