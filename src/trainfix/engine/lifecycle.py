"""The life of a fix: look, decide, replace, guard, and undo. Everything that changes anything happens under one lock.

Modules are imported before the lock is taken, never under it: a thread that imports holds an import lock of its own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trainfix
from trainfix.advisories import Advisory, load, load_all
from trainfix.engine import agreement, finder, guards, replace, report
from trainfix.engine.contract import Fix, Guard, Target, keep_until_window_ends
from trainfix.engine.decide import Decision, State, decide, load_fix, targets_of
from trainfix.engine.errors import UnfixedBugError
from trainfix.engine.targets import TARGETS
from trainfix.environment.installed import find

_LOUD = ("refused", "failed")


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


@dataclass
class _Repair:
    """What the engine knows of one fix: its decisions, and the journal of what it put where."""

    fix: Fix
    installed: str
    decisions: dict[str, Decision]
    journal: list[replace.Entry] = field(default_factory=list)
    standing: list[replace.Entry] = field(default_factory=list)  # the guards' own journal

    @property
    def applied(self) -> frozenset[str]:
        return frozenset(id for id, decision in self.decisions.items() if decision.state == "applied")

    @property
    def guarded(self) -> frozenset[str]:
        return frozenset(id for id, decision in self.decisions.items() if decision.state in ("applied", *_LOUD))

    def in_place(self) -> bool:
        """Whether every target holds one of our replacements now (after a reload it does not)."""
        ours = [entry.replacement for entry in self.journal]
        return bool(ours) and all(any(live is our for our in ours) for live in _live(self.fix.targets))

    def make_way(self) -> None:
        """A target was reloaded. What still stands in a target or guard is taken out, to be judged and replaced anew; a
        reloaded class or function keeps its entries for those who hold it, and they are undone with the rest."""
        live = [id(function) for function in _live(self.fix.targets + self.fix.guards)]
        self.journal = _taken_out(replace.standing(self.journal), live)
        self.standing = _taken_out(replace.standing(self.standing), live)


def _live(places: Sequence[Target | Guard]) -> list[object]:
    """The innermost function at each place, None where there is none."""
    found: list[object] = []
    for place in places:
        try:
            slot, live = replace.resolve(place.path)
        except replace.Missing:
            found.append(None)
            continue
        found.append(replace.inner_slot(slot, live)[1])
    return found


def _taken_out(entries: list[replace.Entry], live: list[int]) -> list[replace.Entry]:
    """Take the entries that are `live` (ids of functions) out; returns the others."""
    replace.take_out([entry for entry in entries if id(entry.replacement) in live])
    return [entry for entry in entries if id(entry.replacement) not in live]


_lock = threading.RLock()
_executed: set[str] = set()
_repairs: dict[str, _Repair] = {}
_disabled: dict[str, str] = dict.fromkeys(finder.current.disabled, "TRAINFIX_DISABLE")
_reverted: set[str] = set()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def on_import(module: str) -> None:
    """The target `module` was executed: decide on every fix whose modules are now all there.

    Raises UnfixedBugError under TRAINFIX=strict, and for an object built before that reaches what cannot be repaired.
    Whatever else goes wrong is said, and the user's import goes on.
    """
    try:
        fixes = [load_fix(name) for name in TARGETS[module]]
        with _lock:
            _executed.add(module)
            for fix in fixes:
                if fix.modules <= _executed:
                    _consider(fix)
    except UnfixedBugError:
        raise
    except Exception as error:
        text = f"trainfix {trainfix.__version__}: nothing is repaired in {module}: {type(error).__name__}: {error}"
        if finder.current.mode == "strict":
            raise UnfixedBugError(text) from error
        report.warn(text, every_rank=True)


def _consider(fix: Fix) -> None:
    known = _repairs.get(fix.name)
    if known is not None and known.in_place():
        return _stand_guard(known)
    if known is not None:
        known.make_way()
    repair = _decided(fix)
    if known is not None:
        repair.journal, repair.standing = known.journal, known.standing
    _repairs[fix.name] = repair
    if repair.applied - set(_disabled):
        _put_in_place(repair)
    _stand_guard(repair)
    _announce(repair)


def _decided(fix: Fix) -> _Repair:
    advisories = [load(id) for id in fix.advisories]
    try:
        versions = _versions(fix)
        paths = targets_of(fix, advisories)
        shapes = {path: replace.live_shape(path) for path in paths}
        others = {path: who for path in paths if (who := replace.foreign(path)) is not None}
        decisions = {advisory.id: decide(fix, advisory, versions, shapes, others) for advisory in advisories}
    except Exception as error:  # broken metadata, a Python whose shapes cannot be compared
        failed = Decision("failed", f"{type(error).__name__}: {error}", None)
        return _Repair(fix, _own_version(fix.package), dict.fromkeys(fix.advisories, failed))
    return _Repair(fix, versions[fix.package], decisions)


def _versions(fix: Fix) -> dict[str, str]:
    """Installed versions of the packages that the fix speaks of; of several copies, the one that was imported."""
    versions = {}
    for package in {fix.package, *fix.requires}:
        copies = find(package)
        file = getattr(sys.modules.get(package), "__file__", None)
        imported = [copy for copy in copies if file and Path(file).resolve().is_relative_to(copy.location / package)]
        for copy in (imported or copies)[:1]:
            versions[package] = copy.version
    versions.setdefault(fix.package, _own_version(fix.package))
    return versions


def _own_version(package: str) -> str:
    """What the imported package says of itself, "0" if it says nothing."""
    return str(getattr(sys.modules.get(package), "__version__", "0"))


def _put_in_place(repair: _Repair) -> None:
    """Replace all targets, or none: a failure is rolled back, and told apart from a refusal."""
    fix, done = repair.fix, list[replace.Entry]()
    try:
        originals = {target.path: replace.inner_slot(*replace.resolve(target.path))[1] for target in fix.targets}
        for path, replacement in fix.build(originals, repair.applied).items():
            done += replace.put(path, replacement)
    except Exception as error:
        replace.take_out(done)
        reason = f"the repair could not be put in place: {type(error).__name__}: {error}"
        repair.decisions = {
            id: Decision("failed", reason, decision.shape) if decision.state == "applied" else decision
            for id, decision in repair.decisions.items()
        }
        return
    repair.journal += done


def _stand_guard(repair: _Repair) -> None:
    """Wrap the constructors and, where nothing is repaired, the events that show that a run reaches an error."""
    active = repair.guarded - set(_disabled)
    loud = active - repair.applied
    for guard in repair.fix.guards:
        wanted = (active if guard.on_construction else loud) & set(guard.reached)
        if guard.module not in _executed or not wanted:
            continue
        try:
            _, live = replace.inner_slot(*replace.resolve(guard.path))
            if any(entry.replacement is live for entry in repair.standing):
                continue
            wrapped = guards.wrap(guard, live, _looker(repair.fix.name, guard))
            repair.standing += replace.put(guard.path, wrapped)
        except Exception as error:
            report.warn(
                f"trainfix: no place to stand guard for {', '.join(sorted(wanted))} at {guard.path}: {error}; "
                "a run that reaches the error there will not be stopped",
                every_rank=True,
            )
            for id in loud & set(guard.reached):
                old = repair.decisions[id]
                reason = f"{old.reason}; and no place to stand guard: {error}"
                repair.decisions[id] = Decision("failed", reason, old.shape)
            continue
        for instance in guards.built_before(guard) if loud else ():
            _looker(repair.fix.name, guard)(instance)


def _looker(name: str, guard: Guard) -> guards.Reached:
    def look(instance: object, *args: Any, **kwargs: Any) -> None:
        repair = _repairs[name]
        for id in guard.reached:
            decision = repair.decisions[id]
            covered = decision.state == "applied" and repair.fix.repairs(instance)
            if id in _disabled or covered or decision.state not in ("applied", *_LOUD):
                continue
            advisory = load(id)
            reason = guards.asked(guard, advisory, instance, *args, **kwargs)
            if reason is not None:
                _stop(repair, advisory, decision, reason, type(instance).__name__)
        if guard.on_construction and repair.journal and repair.fix.repairs(instance):
            _agree(repair, instance)

    return look


def _stop(repair: _Repair, advisory: Advisory, decision: Decision, reason: str, kind: str) -> None:
    why_not = f"{decision.state}: {decision.reason}" if decision.state in _LOUD else f"the repair does not cover {kind}"
    proved = any(known.get(decision.shape or "") == "affected" for known in advisory.evidence.values())
    guards.stop(advisory, repair.installed, reason, why_not, proved=proved, mode=finder.current.mode)


def _agree(repair: _Repair, instance: object) -> None:
    built_for = "+".join(sorted(repair.applied))
    repaired = f"{repair.fix.name} ({built_for}) on {repair.fix.package} {repair.installed}"
    digest = f"trainfix {trainfix.__version__} {repaired}"
    trouble = agreement.disagreement(repair.fix.name, digest, repair.fix.group(instance))
    if trouble is None:
        return
    next_step = "Start every rank in the same environment, with trainfix active."
    text = f"the ranks do not all run the same repair: {trouble}. {next_step}"
    if finder.current.mode != "warn":
        raise UnfixedBugError(text, built_for)
    report.warn(text, every_rank=True)


def _announce(repair: _Repair) -> None:
    """Say what was done: one line on the first rank; refusals and failures on every rank, once; strict stops here."""
    head = f"trainfix {trainfix.__version__}: "
    on = f"({repair.fix.package} {repair.installed})"
    applied = sorted(repair.applied) if repair.journal else []
    if applied and not finder.current.quiet:
        report.inform(f"{head}{', '.join(applied)} applied {on}")
    _warn_shared(repair)
    troubles = []
    for id, decision in repair.decisions.items():
        if id not in _disabled and decision.state in (*_LOUD, "unverified"):
            troubles.append(f"{head}{id} {decision.state} {on}: {decision.reason}")
            report.warn(troubles[-1], every_rank=decision.state in _LOUD)
    if troubles and finder.current.mode == "strict":
        raise UnfixedBugError("\n".join([*troubles, "TRAINFIX=strict stops at the import of what cannot be repaired."]))


def _warn_shared(repair: _Repair) -> None:
    off = sorted(repair.applied & set(_disabled))
    if repair.journal and off:
        together = ",".join(sorted(repair.applied))
        report.warn(
            f"trainfix: {', '.join(off)} stays repaired: its repair is shared with "
            f"{', '.join(sorted(repair.applied - set(_disabled)))}; "
            f"to disable it, disable all together: TRAINFIX_DISABLE={together}"
        )


def status() -> list[Record]:
    """One record per advisory of the catalogue: what trainfix did in this process, and why."""
    with _lock:
        return [_record(advisory) for advisory in load_all()]


def _record(advisory: Advisory) -> Record:
    repair = _repairs.get(advisory.fix or "")
    if repair is None:
        installed = next((copy.version for copy in find(advisory.package)), None)
        state, reason = _waiting(advisory)
        return Record(advisory.id, advisory.fix, advisory.package, installed, None, state, reason, None)
    decision = repair.decisions[advisory.id]
    target = ", ".join(target.path for target in repair.fix.targets) if repair.journal else None
    state, reason = decision.state, decision.reason
    if advisory.id in _disabled and state in ("applied", "unverified", *_LOUD):
        if state == "applied" and repair.journal:
            reason = f"shared with {', '.join(sorted(repair.applied - set(_disabled)))}"
        else:
            state, reason = ("reverted" if advisory.id in _reverted else "disabled"), _disabled[advisory.id]
    if state == "applied":
        reason = "; ".join(filter(None, [reason, *_since_replaced(repair)]))
    return Record(advisory.id, advisory.fix, advisory.package, repair.installed, target, state, reason, decision.shape)


def _since_replaced(repair: _Repair) -> Iterator[str]:
    """Who stands where we stood: a wrapper that still calls us, or somebody who undid the repair. We cannot tell."""
    for entry in repair.journal:
        if (holder := entry.holder()) is not None:
            yield f"{entry.slot.name} has since been replaced by {holder}"


def _waiting(advisory: Advisory) -> tuple[State, str]:
    if finder.current.mode == "off":
        return "disabled", "TRAINFIX=off"
    if advisory.id in _disabled:
        return "reverted" if advisory.id in _reverted else "disabled", _disabled[advisory.id]
    return "waiting", f"{advisory.package} is not imported yet"


def _checked(ids: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(load(id).id for id in ids) or tuple(advisory.id for advisory in load_all())


def apply(*ids: str) -> list[Record]:
    """Repair these advisories (default: all), also ones that the environment disabled. Returns their records.

    Targets that are not imported yet are repaired when they are. On an object in mid-window it takes effect at its
    next window. Raises UnknownAdvisory for an unknown id, and UnfixedBugError if an advisory named here is refused
    or failed.
    """
    wanted = _checked(ids)
    fixes = {name: load_fix(name) for id in wanted if (name := load(id).fix) is not None}
    with _lock:
        if finder.current.mode == "off":  # apply wins over it, for what it names
            _disabled.update({advisory.id: "TRAINFIX=off" for advisory in load_all() if advisory.id not in _disabled})
        for id in wanted:
            _disabled.pop(id, None)
            _reverted.discard(id)
        finder.switch_on()
        for fix in fixes.values():
            if fix.modules <= _executed:
                _consider(fix)
        records = [_record(load(id)) for id in wanted]
    for record in records:
        if record.id in ids and record.state in _LOUD:
            raise UnfixedBugError(f"{record.id} cannot be repaired: {record.state}: {record.reason}", record.id)
    return records


def revert(*ids: str) -> tuple[str, ...]:
    """Undo the repair of these advisories (default: all), in reverse order. Returns the ids whose errors are back.

    A repair that is shared with an advisory not named here stays, with a warning. An object in mid-window finishes that
    window repaired. Raises UnknownAdvisory, and RuntimeError, having undone nothing, if somebody else has replaced a
    function since.
    """
    wanted = _checked(ids)
    with _lock:
        repairs = [repair for repair in _repairs.values() if set(wanted) & set(repair.fix.advisories)]
        gone = {*_disabled, *wanted}
        leaving = [repair for repair in repairs if not repair.applied - gone]
        unguarded = [repair for repair in leaving if not repair.guarded - gone]
        standing = [entry for repair in unguarded for entry in repair.standing]
        for entry in [entry for repair in leaving for entry in repair.journal] + standing:
            if (holder := entry.holder()) is not None:
                what = f"{replace.describe(entry.original)} has since been replaced by {holder}"
                raise RuntimeError(f"cannot revert {', '.join(wanted)}: {what}")
        for id in wanted:
            _disabled[id] = "trainfix.revert()"
            _reverted.add(id)
        back = tuple(sorted(id for repair in leaving if repair.journal for id in repair.applied))
        for repair in unguarded:
            replace.take_out(repair.standing)
            repair.standing.clear()
        for repair in leaving:
            _undo(repair)
        for repair in repairs:
            _warn_shared(repair)
    return back


def _undo(repair: _Repair) -> None:
    methods = {entry.slot.name: entry.replacement for entry in repair.journal if isinstance(entry.slot.owner, type)}
    for instance in repair.fix.in_window():
        keep_until_window_ends(instance, methods)
    replace.take_out(replace.standing(repair.journal))
    repair.journal.clear()
