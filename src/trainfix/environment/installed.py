"""Which packages are installed, in which version and where, from metadata and source text alone: importing nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution as Metadata
from importlib.metadata import DistributionFinder, MetadataPathFinder
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainfix.environment.shapes import ABSENT, shape_in_text


class EnvironmentProblem(Exception):
    """Something installed cannot be read. The message names the file and the next step."""


@dataclass(frozen=True)
class Distribution:
    """One installed copy of a package. `location` is the folder on the path that holds it."""

    name: str
    version: str
    location: Path


def find(name: str, paths: Sequence[str] | None = None) -> list[Distribution]:
    """Every installed copy of `name` along `paths` (default ``sys.path``), the one that an import would take first.

    Raises EnvironmentProblem when a copy's metadata names no version.
    """
    copies: dict[Path, Distribution] = {}
    for path in sys.path if paths is None else paths:
        context = DistributionFinder.Context(name=name, path=[path or "."])
        for metadata in MetadataPathFinder.find_distributions(context):
            location = _location(metadata, path)
            if location in copies:
                continue
            version = _version(metadata)
            if not version:
                raise EnvironmentProblem(
                    f"{name} in {location} has no version in its metadata: the installation is broken; "
                    f"reinstall it with `pip install --force-reinstall --no-deps {name}`"
                )
            copies[location] = Distribution(name, version, location)
    return list(copies.values())


def _version(metadata: Metadata) -> str | None:
    """The version in the head of the metadata: to parse all of it, a whole README, takes many times as long."""
    text = metadata.read_text("METADATA") or metadata.read_text("PKG-INFO") or ""
    found = re.search(r"^Version:[ \t]*(\S+)", text.partition("\n\n")[0], re.M | re.I)
    return found[1] if found else None


def _location(metadata: Metadata, path: str) -> Path:
    """The folder that holds the package: beside its metadata, or where an editable install left its sources."""
    try:
        origin = json.loads(metadata.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return Path(unquote(urlsplit(origin["url"]).path)).resolve()
    except (ValueError, KeyError, AttributeError):
        pass  # a file that says nothing of use: the package is where everybody's is
    return Path(path or ".").resolve()


def shapes_of(distribution: Distribution, paths: Iterable[str]) -> dict[str, str | None]:
    """path (``module:qualname``) -> shape as installed; ABSENT: no such function; None: no source to look into.

    Each file is read once. Raises EnvironmentProblem as `source_text` does, and ShapeError.
    """
    texts: dict[str, str | None] = {}
    found: dict[str, str | None] = {}
    for path in paths:
        module, _, qualname = path.partition(":")
        if module not in texts:
            texts[module] = source_text(distribution, module)
        text = texts[module]
        if text is None:
            found[path] = None if _compiled(distribution, module) else ABSENT
        else:
            found[path] = shape_in_text(text, qualname) or ABSENT
    return found


def _compiled(distribution: Distribution, module: str) -> bool:
    """Whether `module`, which has no source here, may be there all the same: compiled, or in a package that is."""
    *parents, name = module.split(".")
    folder = distribution.location.joinpath(*parents)
    if not (distribution.location / parents[0] / "__init__.py").is_file():
        return True
    return folder.is_dir() and any(file.stem.partition(".")[0] == name for file in folder.iterdir())


def source_text(distribution: Distribution, module: str) -> str | None:
    """The source of `module` as installed with `distribution`; None if there is no such file (or only a ``.pyc``).

    Raises EnvironmentProblem when the file is there and cannot be read.
    """
    stem = distribution.location.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        try:
            return path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise EnvironmentProblem(
                f"cannot read {path}: {error}; "
                f"make it readable, or reinstall {distribution.name} {distribution.version}"
            ) from error
    return None
