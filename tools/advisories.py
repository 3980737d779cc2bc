"""Write docs/advisories.md, one section per record of the catalogue: `python tools/advisories.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from trainfix.advisories import Advisory, load_all
from trainfix.advisories.reach import condition
from trainfix.engine.decide import load_fix

PAGE = Path(__file__).resolve().parents[1] / "docs" / "advisories.md"
HEAD = """\
# The catalogue

Every silent training error that trainfix knows, from the records in `src/trainfix/advisories/records`. This page is
written by `python tools/advisories.py`; `trainfix show ID` prints the same. What *evidence* means: *proved*, shown by
an experiment on the released package; *read*, seen in its source; *reported*, found in an issue or pull request.
"""


def page() -> str:
    """The whole page."""
    sections = ["\n".join(_section(advisory)) for advisory in load_all()]
    index = "\n".join(f"- [{one.id}](#{one.id.lower()}) {one.summary}" for one in load_all())
    return "\n".join([HEAD, index, "", *sections])


def _section(one: Advisory) -> Iterator[str]:
    since = "" if one.introduced == "0" else f"{one.introduced} to "
    yield f"## {one.id}\n\n**{one.summary}**\n"
    yield f"- affected: {one.package} {since or 'up to '}{one.affected[-1]}"
    if one.needs:
        yield f"- only with: {', '.join(f'{package} {allowed}' for package, allowed in one.needs.items())}"
    yield f"- severity: {one.severity}; evidence: {one.evidence_level}"
    yield f"- reached if: {'; '.join(condition(trigger) for trigger in one.triggers) or 'always'}"
    yield f"- repair: {_repair(one)}"
    yield f"- upgrade: {f'{one.package} {one.fixed_in}' if one.fixed_in else 'no release repairs it yet'}"
    yield f"- config: {one.ways_out['config']}"
    yield f"\n{one.details}\n"
    yield ", ".join(f"[{kind.lower()}]({url})" for kind, url in one.references) + "\n"


def _repair(one: Advisory) -> str:
    if one.source_patches:
        return f"`import trainfix`, or the [source patch](../patches/{one.id}/README.md)"
    if one.through is not None:
        return f"`import trainfix`, through [{one.through}](#{one.through.lower()})"
    if one.fix is None:
        return "none yet"
    stands_guard = load_fix(one.fix).build is None
    return f"none; a run that reaches it is {_told(one)}" if stands_guard else "`import trainfix`"


def _told(one: Advisory) -> str:
    stops = one.severity in ("gradient", "scale") and one.evidence_level == "proved"
    return "stopped" if stops else "warned"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"{PAGE} written\n")
