"""``trainfix list``, ``show ID``, ``diff ID``: the catalogue, one advisory explained, one source patch."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING

from trainfix.cli import base
from trainfix.cli.page import WIDTH, wrapped

if TYPE_CHECKING:
    from trainfix.advisories import Advisory, SourcePatch


def list_all(args: argparse.Namespace) -> int:
    """One line per advisory."""
    from trainfix.advisories import load_all

    for one in load_all():
        head = f"{one.id}  {one.package} {_band(one)}"
        print(f"{head:<42}  {one.severity:<9}  {one.summary}")
    return base.OK


def show(args: argparse.Namespace) -> int:
    """Everything that the record says about one advisory, in words."""
    from trainfix.advisories import load
    from trainfix.advisories.hazards import between
    from trainfix.advisories.reach import condition

    one = load(args.id)
    release = one.ways_out["upgrade"]
    changed = between(one.package, one.affected[-1], one.last_run) if release else ()
    hazards = ", ".join(f"{hazard.key} in {hazard.release}" for hazard in changed if hazard.key is not None)
    print(f"{one.id}  {one.summary}\n")
    for paragraph in filter(None, one.details.split("\n")):
        print(textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n")
    rows = [
        ("package", f"{one.package} {_band(one)}; last release run: {one.last_run}"),
        ("only with", ", ".join(f"{package} {allowed}" for package, allowed in one.needs.items())),
        ("severity", f"{one.severity}, evidence: {one.evidence_level}"),
        *(("reached if", condition(trigger)) for trigger in one.triggers),
        ("reached if", "" if one.triggers else "every run reaches it"),
        ("repair", _repair(one)),
        ("upgrade", f"to {one.package} {release}" if release else f"no release of {one.package} repairs it yet"),
        (
            "hazards",
            f"an upgrade also changes the defaults of {hazards} (doctor says what this means)" if hazards else "",
        ),
        ("config", one.ways_out["config"] or ""),
        ("proof", f"trainfix prove {one.id}" if one.proof else "none"),
        *(("patch", f"{one.package}{patch.releases}: trainfix diff {one.id}") for patch in one.source_patches),
        *((kind.lower(), url) for kind, url in one.references),
    ]
    previous = None
    for label, text in rows:
        for line in wrapped(label if label != previous else "", text, indent=0):
            print(line)
        previous = label
    return base.OK


def _repair(one: Advisory) -> str:
    from trainfix.engine.decide import load_fix

    if one.through is not None:
        return f"import trainfix (through {one.through})"
    if one.fix is None:
        return "none yet"
    if load_fix(one.fix).build is None:
        return "none; with import trainfix, a run that reaches it is told"
    return f"import trainfix (fix {one.fix})"


def diff(args: argparse.Namespace) -> int:
    """The unified diff that repairs one release's source: for people who build images."""
    from trainfix.advisories import RecordError, load, patches_folder

    one = load(args.id)
    if not one.source_patches:
        raise base.UsageError(f"{one.id} has no source patch; `trainfix show {one.id}` has the ways out")
    version = _wanted(one, args.release) if args.release else _installed(one)
    patch = _patch_for(one, version)
    file = patches_folder() / one.id / patch.file
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"cannot read {file}: {error.strerror}; reinstall trainfix") from error
    sys.stdout.write(text)
    return base.OK


def _band(one: Advisory) -> str:
    """The affected releases: the first known (OSV's 0 means from the beginning) to the last."""
    last = one.affected[-1]
    if one.introduced == "0":
        return f"up to {last}"
    return last if one.introduced == last else f"{one.introduced} to {last}"


def _wanted(one: Advisory, release: str) -> str:
    """The version in ``deepspeed==0.18.9``."""
    from packaging.version import InvalidVersion, Version

    package, _, version = release.partition("==")
    if package != one.package:
        raise base.UsageError(f"--for {release}: {one.id} concerns {one.package}; write --for {_example(one)}")
    try:
        return str(Version(version))
    except InvalidVersion:
        raise base.UsageError(f"--for {release} names no release; write --for {_example(one)}") from None


def _example(one: Advisory) -> str:
    return f"{one.package}=={one.affected[-1]}"


def _installed(one: Advisory) -> str:
    from trainfix.environment.installed import find

    copies = find(one.package)
    if not copies:
        raise base.UsageError(f"{one.package} is not installed: say for which release, --for {_example(one)}")
    return copies[0].version


def _patch_for(one: Advisory, version: str) -> SourcePatch:
    from packaging.specifiers import SpecifierSet

    for patch in one.source_patches:
        if SpecifierSet(patch.releases).contains(version, prereleases=True):
            return patch
    bands = ", ".join(f"{one.package}{patch.releases}" for patch in one.source_patches)
    raise base.UsageError(f"{one.id} has no source patch for {one.package} {version}: there are patches for {bands}")


def _none(parser: argparse.ArgumentParser) -> None:
    """`list` takes nothing."""


def _id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=base.advisory_id, metavar="ID", help="the advisory, e.g. TF-0001")


def _id_and_release(parser: argparse.ArgumentParser) -> None:
    _id(parser)
    parser.add_argument(
        "--for", dest="release", metavar="PACKAGE==RELEASE", help="default: the release that is installed"
    )


COMMANDS = (
    ("list", "every known silent error", _none, list_all),
    ("show", "one advisory explained", _id, show),
    ("diff", "the source patch of an advisory for one release", _id_and_release, diff),
)
