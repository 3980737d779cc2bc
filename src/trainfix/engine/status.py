"""How the advisories stand in this process: what `trainfix.status()` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields

from trainfix.advisories import Advisory, judge
from trainfix.engine import finder, register
from trainfix.engine.decide import State, decide
from trainfix.engine.register import LOUD, Repair
from trainfix.environment.installed import find, shapes_of


@dataclass(frozen=True)
class Record:
    """One advisory as it stands in this process. `target` names what is replaced, `shape` is the deciding shape."""

    id: str
    fix: str | None
    package: str
    installed: str | None
    target: str | None
    state: State
    reason: str
    shape: str | None


def records_of(advisories: Sequence[Advisory]) -> list[Record]:
    """One record each. The installed copy of a package is looked for once, and each of its files read once."""
    packages = {name for one in advisories for name in (one.package, *one.needs)}
    copies = {package: next(iter(find(package)), None) for package in packages}
    shapes: dict[str, str | None] = {}
    for package, copy in copies.items():
        if copy is not None:
            known_only = [one for one in advisories if one.package == package and one.fix is None]
            shapes |= shapes_of(copy, [path for one in known_only for path in one.evidence])
    versions = {package: copy.version for package, copy in copies.items() if copy is not None}
    return [_through(one, versions, shapes) or record_of(one, versions, shapes) for one in advisories]


def record_of(advisory: Advisory, versions: Mapping[str, str], shapes: Mapping[str, str | None]) -> Record:
    repair = register.repairs.get(advisory.fix or "")
    if repair is None:
        state, reason = _waiting(advisory)
        shape, installed = None, versions.get(advisory.package)
        if advisory.fix is None and installed is not None and state == "waiting":
            decision = decide(None, advisory, versions, shapes)
            state, reason, shape = decision.state, decision.reason, decision.shape
        return Record(advisory.id, advisory.fix, advisory.package, installed, None, state, reason, shape)
    decision = repair.decisions[advisory.id]
    target = ", ".join(target.path for target in repair.fix.targets) if repair.journal else None
    state, reason = decision.state, decision.reason
    if advisory.id in register.disabled and state in ("applied", "unverified", *LOUD):
        if state == "applied" and repair.journal:
            reason = f"shared with {', '.join(sorted(repair.applied - set(register.disabled)))}"
        else:
            state = "reverted" if advisory.id in register.reverted else "disabled"
            reason = register.disabled[advisory.id]
    if state == "applied":
        reason = "; ".join(filter(None, [reason, *_since_replaced(repair), *repair.fix.notes()]))
    return Record(advisory.id, advisory.fix, advisory.package, repair.installed, target, state, reason, decision.shape)


def _through(advisory: Advisory, versions: Mapping[str, str], shapes: Mapping[str, str | None]) -> Record | None:
    """What became of the repair of the package at fault; None where that is the advisory's own, or not affected."""
    if advisory.through is None or advisory.package not in versions:
        return None
    if judge(advisory, versions, shapes).verdict != "affected":
        return None
    record = record_of(advisory.repaired_by, versions, shapes)
    reason = f"through {record.id}" + (f": {record.reason}" if record.reason else "")
    return replace_fields(
        record, id=advisory.id, package=advisory.package, installed=versions[advisory.package], reason=reason
    )


def _since_replaced(repair: Repair) -> Iterator[str]:
    """Who stands where we stood: a wrapper that still calls us, or somebody who undid the repair. We cannot tell."""
    for entry in repair.journal:
        if (holder := entry.holder()) is not None:
            yield f"{entry.slot.name} has since been replaced by {holder}"


def _waiting(advisory: Advisory) -> tuple[State, str]:
    if finder.current.mode == "off":
        return "disabled", "TRAINFIX=off"
    if advisory.id in register.disabled:
        return "reverted" if advisory.id in register.reverted else "disabled", register.disabled[advisory.id]
    return "waiting", f"{advisory.package} is not imported yet"
