"""Write docs/advisories, one page per record of the catalogue and the index of them: `python tools/advisories.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from trainfix.advisories import Advisory, load_all
from trainfix.advisories.reach import RUNS_WITH, condition
from trainfix.engine.decide import load_fix

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "advisories"
INDEX = "README.md"
HEAD = """\
# The catalogue

Every silent training error that trainfix knows, from the records in `src/trainfix/advisories/records` (OSV, with what
is ours under `database_specific.trainfix`). These pages are written by `python tools/advisories.py`; `trainfix show ID`
prints the same. *proved*: shown by an experiment on the released package; *read*: seen in its source; *reported*: found
in an issue or pull request.
"""


def pages() -> Mapping[str, str]:
    """File name -> text of every page."""
    return {INDEX: _index(), **{f"{one.id}.md": "\n".join(_page(one)) + "\n" for one in load_all()}}


def _index() -> str:
    parts = [HEAD]
    for package, of_package in groupby(sorted(load_all(), key=lambda one: one.id[:5]), key=lambda one: one.package):
        rows = [f"| [{one.id}]({one.id}.md) | {one.summary} | {_band(one)} | {_short(one)} |" for one in of_package]
        parts += [f"## {package}\n\n| id | error | releases | repair |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"]
    return "\n".join(parts)


def _page(one: Advisory) -> Iterator[str]:
    yield f"# {one.id}: {one.summary}\n"
    yield from (f"{paragraph}\n" for paragraph in one.details.split("\n") if paragraph)
    yield "| | |\n|---|---|"
    for name, text in _facts(one):
        yield f"| {name} | {text} |"
    yield "\n## Reached if\n"
    uses = RUNS_WITH.get(one.package)
    conditions = [condition(trigger) for trigger in ([uses] if uses is not None else []) + list(one.triggers)]
    yield "\n".join(f"- {_plain(text)}" for text in conditions) or "every run reaches it"
    yield "\n## Ways out\n"
    yield "\n".join(f"- {text}" for text in _ways_out(one))
    if one.evidence:
        yield "\n## How it is recognised\n"
        yield "By the shape (a hash of the syntax tree) of these functions, whatever the version says:\n"
        yield "\n".join(f"- `{path}`" for path in one.evidence)
    yield "\n## Links\n"
    yield "\n".join(f"- {kind.lower()}: <{url}>" for kind, url in one.references)


def _facts(one: Advisory) -> Iterator[tuple[str, str]]:
    yield "affected", f"{one.package} {_band(one)} ({len(one.affected)} releases; the last one run: {one.last_run})"
    if one.needs:
        yield "only with", ", ".join(f"{package} {allowed}" for package, allowed in one.needs.items())
    yield "severity", one.severity
    yield "evidence", one.evidence_level
    yield "repair", _repair(one)
    yield "proof", f"`trainfix prove {one.id}`" if one.proof else "none"


def _ways_out(one: Advisory) -> Iterator[str]:
    yield f"repair: {_repair(one)}"
    yield f"upgrade: {f'{one.package} {one.fixed_in}' if one.fixed_in else 'no release repairs it yet'}"
    yield f"config: {one.ways_out['config']}"


def _band(one: Advisory) -> str:
    last = one.affected[-1]
    if one.introduced == "0":
        return f"up to {last}"
    return last if one.affected[0] == last else f"{one.affected[0]} to {last}"


def _plain(text: str) -> str:
    """A condition as text: ``**kwargs`` is no emphasis."""
    return text.replace("*", r"\*").replace("_", r"\_")


def _short(one: Advisory) -> str:
    if one.through is not None:
        return f"through {one.through}"
    if one.fix is None:
        return "none yet"
    return "yes" if load_fix(one.fix).build is not None else f"none; {_told(one)}"


def _repair(one: Advisory) -> str:
    if one.source_patches:
        return f"`import trainfix`, or the [source patch](../../patches/{one.id}/README.md)"
    if one.through is not None:
        return f"`import trainfix`, through [{one.through}]({one.through}.md)"
    if one.fix is None:
        return "none yet"
    stands_guard = load_fix(one.fix).build is None
    return f"none; a run that reaches it is {_told(one)}" if stands_guard else "`import trainfix`"


def _told(one: Advisory) -> str:
    stops = one.severity in ("gradient", "scale") and one.evidence_level == "proved"
    return "stopped" if stops else "warned"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for stale in {path.name for path in FOLDER.iterdir()} - set(wanted):
        (FOLDER / stale).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    sys.stderr.write(f"{len(wanted)} pages written to {FOLDER}\n")


if __name__ == "__main__":
    main()
