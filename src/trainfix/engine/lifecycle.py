"""The life of a fix: look, decide, replace, guard, and undo. Everything that changes anything happens under one lock.

Modules are imported before the lock is taken, never under it: a thread that imports holds an import lock of its own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import trainfix
from trainfix.advisories import Advisory
from trainfix.engine import agreement, finder, guards, register, replace, report, stamp
from trainfix.engine.contract import Fix, Guard, keep_until_window_ends
from trainfix.engine.decide import Decision, State, decide, load_fix, shipped_by, targets_of
from trainfix.engine.errors import UnfixedBugError
from trainfix.engine.plugins import load, load_all
from trainfix.engine.register import LOUD, Repair
from trainfix.engine.status import Record, record_of, records_of
from trainfix.engine.targets import TARGETS
from trainfix.environment.installed import find


@dataclass
class _Post:
    """One guarded function, and the fixes that stand guard there."""

    guards: dict[str, Guard] = field(default_factory=dict)
    journal: list[replace.Entry] = field(default_factory=list)

    def look(self, instance: object, *args: Any, **kwargs: Any) -> None:
        for name, guard in list(self.guards.items()):
            _look(register.repairs[name], guard, instance, *args, **kwargs)


_lock = threading.RLock()
_posts: dict[str, _Post] = {}
_left_alone: set[str] = set()  # what was said of objects with code of the user's own


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
            register.executed.add(module)
            for fix in fixes:
                if fix.modules <= register.executed:
                    _consider(fix)
            _stand_at_checkpoints()
            if not any(_under_way(name) for name in list(TARGETS)):
                _announce()  # one summary for all
    except UnfixedBugError:
        raise
    except Exception as error:
        text = f"trainfix {trainfix.__version__}: nothing is repaired in {module}: {type(error).__name__}: {error}"
        if finder.current.mode == "strict":
            raise UnfixedBugError(text) from error
        report.warn(text, every_rank=True)


def _under_way(module: str) -> bool:
    """Whether a target is being executed right now, further up this stack or in another thread."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return module not in register.executed and bool(getattr(spec, "_initializing", False))


def _consider(fix: Fix, *, anew: bool = False) -> None:
    _stamps.aside([guard.path for guard in fix.guards])
    known = register.repairs.get(fix.name)
    if known is not None and known.in_place() and not anew:
        return _stand_guard(known)
    if known is not None:
        known.make_way()
    repair = _decided(fix)
    if known is not None:
        repair.journal = known.journal
    register.repairs[fix.name] = repair
    if repair.applied - set(register.disabled):
        _put_in_place(repair)
    _stand_guard(repair)


def _decided(fix: Fix) -> Repair:
    advisories = [load(id) for id in fix.advisories]
    try:
        versions = _versions(fix)
        paths = targets_of(fix, advisories)
        shapes = {path: replace.live_shape(path) for path in paths}
        others = {path: who for path in paths if (who := replace.foreign(path)) is not None}
        decisions = {
            advisory.id: _only_if_asked(advisory, decide(fix, advisory, versions, shapes, others))
            for advisory in advisories
        }
    except Exception as error:  # broken metadata, a Python whose shapes cannot be compared
        failed = Decision("failed", f"{type(error).__name__}: {error}", None)
        return Repair(fix, _own_version(fix.package), dict.fromkeys(fix.advisories, failed))
    return Repair(fix, versions[fix.package], decisions)


def _only_if_asked(advisory: Advisory, decision: Decision) -> Decision:
    if advisory.severity != "precision" or advisory.id in register.asked or decision.state != "applied":
        return decision
    reason = f"a loss of precision, repaired only when it is asked for: trainfix.apply({advisory.id!r})"
    return Decision("disabled", reason, decision.shape)


def _versions(fix: Fix) -> dict[str, str]:
    """Installed versions of the packages that the fix speaks of; of several copies, the one that was imported."""
    versions = {}
    for package in {fix.package, *fix.requires, *(name for id in fix.advisories for name in load(id).needs)}:
        version = _installed_version(package)
        if version is not None:
            versions[package] = version
    versions.setdefault(fix.package, _own_version(fix.package))
    return versions


def _installed_version(package: str) -> str | None:
    copies = find(package)
    file = getattr(sys.modules.get(package), "__file__", None)
    imported = [copy for copy in copies if file and Path(file).resolve().is_relative_to(copy.location / package)]
    return next((copy.version for copy in imported or copies), None)


def _own_version(package: str) -> str:
    """What the imported package says of itself, "0" if it says nothing."""
    return str(getattr(sys.modules.get(package), "__version__", "0"))


def _put_in_place(repair: Repair) -> None:
    """Replace all targets, or none: a failure is rolled back, and told apart from a refusal."""
    fix, done = repair.fix, list[replace.Entry]()
    assert fix.build is not None
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


def _stand_guard(repair: Repair) -> None:
    """Wrap the constructors and, where nothing is repaired, the events that show that a run reaches an error."""
    active = repair.guarded - set(register.disabled)
    loud = active - repair.applied
    for guard in repair.fix.guards:
        wanted = (active if guard.on_construction else loud) & set(guard.reached)
        if guard.module not in register.executed or not wanted:
            continue
        post = _posts.setdefault(guard.path, _Post())
        known = repair.fix.name in post.guards
        post.guards[repair.fix.name] = guard
        try:
            _, live = replace.inner_slot(*replace.resolve(guard.path))
            if not any(entry.replacement is live for entry in post.journal):
                known = False
                post.journal += replace.put(guard.path, guards.wrap(guard, live, post.look))
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
        for instance in guards.built_before(guard) if loud and not known else ():
            _look(repair, guard, instance)


def _stand_at_checkpoints() -> None:
    """Watch where runs of what is repaired now save and load, and nowhere else."""
    repaired = [repair for repair in register.repairs.values() if repair.journal and finder.current.stamp]
    targets = {target.path for repair in repaired for target in repair.fix.targets}
    wanted = stamp.of_packages(repair.fix.package for repair in repaired)
    _stamps.stand([place for place in wanted if place.module in register.executed and place.path not in targets])


def _account() -> tuple[list[Record], dict[str, str]]:
    """For a stamp: a record of each advisory that was decided on in this process, and the imported packages."""
    with _lock:
        records = [record_of(load(id), {}, {}) for repair in register.repairs.values() for id in repair.decisions]
        shippers = [
            shipped for repair in register.repairs.values() if (shipped := shipped_by(repair.fix.name)) is not None
        ]
    packages = ["torch", *(name for name in list(TARGETS) if "." not in name)]
    found = {name: _installed_version(name) or _own_version(name) for name in packages if name in sys.modules}
    return records, {**found, **dict(one.split(" ", 1) for one in shippers)}


def _looked_after(parts: Sequence[Any]) -> set[str]:
    """The advisories that harm gradients, of the fixes that look after one of these objects."""
    caring = [
        repair.fix
        for repair in list(register.repairs.values())
        if any(
            guards.is_built_at(guard, part) and (repair.fix.acted or repair.fix.repairs)(part)
            for part in parts
            for guard in repair.fix.guards
        )
    ]
    return {id for fix in caring for id in fix.advisories if load(id).severity in guards.HARMFUL}


_stamps = stamp.Posts(_account, _looked_after)


def look(fix: str, guard: Guard, instance: object) -> None:
    """For a fix whose event is no call of a method, which the engine could guard: to be called before it happens."""
    _look(register.repairs[fix], guard, instance)


def _look(repair: Repair, guard: Guard, instance: object, *args: Any, **kwargs: Any) -> None:
    """Whether this object, or this call, reaches what the fix does not repair; and do all ranks repair it alike?"""
    if guard.on_construction and (own := repair.fix.own(instance)) is not None:
        return _say_left_alone(repair, own)
    for id in guard.reached:
        decision = repair.decisions[id]
        covered = decision.state == "applied" and repair.fix.repairs(instance)
        lost = repair.lost() if covered else []
        if id in register.disabled or (covered and not lost) or decision.state not in ("applied", *LOUD):
            continue
        advisory = load(id)
        reason = guards.asked(guard, advisory, instance, *args, **kwargs)
        if reason is not None:
            _stop(repair, advisory, decision, reason, type(instance).__name__, lost)
    if guard.on_construction and repair.journal and repair.fix.repairs(instance):
        _agree(repair, instance)


def _say_left_alone(repair: Repair, own: str) -> None:
    """The user computes it with code of their own, which we do not know: no error, and nothing that we touch."""
    ids = sorted(repair.guarded - set(register.disabled))
    text = f"trainfix {trainfix.__version__}: {', '.join(ids)} not-affected ({own})"
    if ids and text not in _left_alone:
        _left_alone.add(text)
        report.inform(text)


def _stop(repair: Repair, advisory: Advisory, decision: Decision, reason: str, kind: str, lost: Sequence[str]) -> None:
    why_not = f"{decision.state}: {decision.reason}" if decision.state in LOUD else f"the repair does not cover {kind}"
    why_not = "; ".join(lost) or why_not
    proved = any(known.get(decision.shape or "") == "affected" for known in advisory.evidence.values())
    guards.stop(advisory, repair.installed, reason, why_not, proved=proved, mode=finder.current.mode)


def _agree(repair: Repair, instance: object) -> None:
    built_for = "+".join(sorted(repair.applied))
    repaired = f"{repair.fix.name} ({built_for}) on {repair.fix.package} {repair.installed}"
    shipped = shipped_by(repair.fix.name)
    digest = f"trainfix {trainfix.__version__} {f'with {shipped} ' if shipped else ''}{repaired}"
    trouble = agreement.disagreement(repair.fix.name, digest, repair.fix.group(instance))
    if trouble is None:
        return
    next_step = "Start every rank in the same environment, with trainfix active."
    text = f"the ranks do not all run the same repair: {trouble}. {next_step}"
    if finder.current.mode != "warn":
        raise UnfixedBugError(text, built_for)
    report.warn(text, every_rank=True)


def _announce() -> None:
    """Say what was done since last time: one line on the first rank; refusals and failures on every rank, once; strict
    stops here."""
    fresh = [repair for repair in register.repairs.values() if not repair.told]
    for repair in fresh:
        repair.told = True
    packages = {f"({repair.fix.package} {repair.installed})": list[Repair]() for repair in fresh}
    for repair in fresh:
        packages[f"({repair.fix.package} {repair.installed})"].append(repair)
    troubles = [line for on, repairs in packages.items() for line in _announce_package(on, repairs)]
    if troubles and finder.current.mode == "strict":
        raise UnfixedBugError("\n".join([*troubles, "TRAINFIX=strict stops at the import of what cannot be repaired."]))


def _announce_package(on: str, repairs: Sequence[Repair]) -> list[str]:
    """The summary of one package's fixes, and a warning for each reason that something is not repaired: returned."""
    head = f"trainfix {trainfix.__version__}: "
    applied = sorted(id for repair in repairs if repair.journal for id in repair.applied)
    if applied and not finder.current.quiet:
        report.inform(f"{head}{', '.join(applied)} applied {on}")
    troubles: dict[tuple[State, str], list[str]] = {}
    for repair in repairs:
        _warn_shared(repair)
        for id, decision in repair.decisions.items():
            known_only = repair.fix.build is None  # said where a run reaches it
            if id not in register.disabled and not known_only and decision.state in (*LOUD, "unverified"):
                troubles.setdefault((decision.state, decision.reason), []).append(id)
    lines = []
    for (state, reason), ids in troubles.items():
        lines.append(f"{head}{', '.join(sorted(ids))} {state} {on}: {reason}")
        report.warn(lines[-1], every_rank=state in LOUD)
    return lines


def _warn_shared(repair: Repair) -> None:
    named = {one.id for one in load_all() if one.repaired_by.id in repair.applied - set(register.disabled)}
    off = sorted((repair.applied | named) & set(register.disabled))
    if repair.journal and off:
        together = ",".join(sorted({*repair.applied, *off}))
        report.warn(
            f"trainfix: {', '.join(off)} stays repaired: its repair is shared with "
            f"{', '.join(sorted(repair.applied - set(register.disabled)))}; "
            f"to disable it, disable all together: TRAINFIX_DISABLE={together}"
        )


def status() -> list[Record]:
    """One record per advisory of the catalogue: what trainfix did in this process, and why."""
    with _lock:
        return records_of(load_all())


def _checked(ids: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(load(id).id for id in ids) or tuple(advisory.id for advisory in load_all())


def apply(*ids: str) -> list[Record]:
    """Repair these advisories (default: all), also ones that the environment disabled. Returns their records.

    Targets that are not imported yet are repaired when they are. On an object in mid-window it takes effect at its
    next window. Raises UnknownAdvisory for an unknown id, and UnfixedBugError if an advisory named here is refused
    or failed.
    """
    wanted = _checked(ids)
    repairing = [load(id).repaired_by for id in wanted]
    fixes = {one.fix: load_fix(one.fix) for one in repairing if one.fix is not None}
    with _lock:
        if finder.current.mode == "off":  # apply wins over it, for what it names
            register.disabled.update(
                {advisory.id: "TRAINFIX=off" for advisory in load_all() if advisory.id not in register.disabled}
            )
        for id in {*wanted, *(one.id for one in repairing)}:
            register.disabled.pop(id, None)
            register.reverted.discard(id)
        finder.switch_on()
        newly = _ask_for({id for id in ids if load(id).severity == "precision"} - register.asked)
        for name, fix in fixes.items():
            if fix.modules <= register.executed:
                _consider(fix, anew=name in newly)
        _stand_at_checkpoints()
        _announce()
        records = records_of([load(id) for id in wanted])
    for record in records:
        if record.id in ids and record.state in LOUD:
            raise UnfixedBugError(f"{record.id} cannot be repaired: {record.state}: {record.reason}", record.id)
    return records


def _ask_for(ids: set[str]) -> set[str | None]:
    """Note that these precision advisories are asked for. Returns the fixes that must be built anew for them."""
    register.asked.update(ids)
    return {load(id).fix for id in ids}


def revert(*ids: str) -> tuple[str, ...]:
    """Undo the repair of these advisories (default: all), in reverse order. Returns the ids whose errors are back.

    A repair that is shared with an advisory not named here stays, with a warning. An object in mid-window finishes that
    window repaired. Raises UnknownAdvisory, and RuntimeError, having undone nothing, if somebody else has replaced a
    function since.
    """
    wanted = tuple(dict.fromkeys(name for id in _checked(ids) for name in (id, load(id).repaired_by.id)))
    with _lock:
        repairs = [repair for repair in register.repairs.values() if set(wanted) & set(repair.fix.advisories)]
        gone = {*register.disabled, *wanted}
        leaving = [repair for repair in repairs if not repair.applied - gone]
        unguarded = [repair for repair in leaving if not repair.guarded - gone]
        posts = _left_by(unguarded)
        _stamps.aside([guard.path for repair in unguarded for guard in repair.fix.guards])
        journals = [repair.journal for repair in leaving] + [post.journal for post in posts]
        for entry in chain.from_iterable(journals):
            if (holder := entry.holder()) is not None:
                _stand_at_checkpoints()
                what = f"{replace.describe(entry.original)} has since been replaced by {holder}"
                raise RuntimeError(f"cannot revert {', '.join(wanted)}: {what}")
        for id in wanted:
            register.disabled[id] = "trainfix.revert()"
            register.reverted.add(id)
        back = {id for repair in leaving if repair.journal for id in repair.applied}
        for post in posts:
            replace.take_out(post.journal)
            post.journal.clear()
        for post in _posts.values():
            for repair in unguarded:
                post.guards.pop(repair.fix.name, None)
        for repair in leaving:
            _undo(repair)
        back |= _no_longer_asked(register.asked & set(wanted), [repair for repair in repairs if repair not in leaving])
        _stand_at_checkpoints()
        for repair in repairs:
            _warn_shared(repair)
    return tuple(sorted(back))


def _left_by(repairs: Sequence[Repair]) -> list[_Post]:
    """The posts at which nobody but these stands guard."""
    names = {repair.fix.name for repair in repairs}
    return [post for post in _posts.values() if post.journal and set(post.guards) <= names]


def _no_longer_asked(ids: set[str], staying: Sequence[Repair]) -> set[str]:
    """Precision advisories that are reverted: the fixes that stay for others are built again without them."""
    register.asked.difference_update(ids)
    shared = [repair for repair in staying if ids & repair.applied]
    back = {id for repair in shared for id in ids & repair.applied}
    for repair in shared:
        _consider(repair.fix, anew=True)
        register.repairs[repair.fix.name].told = True
    return back


def _undo(repair: Repair) -> None:
    methods = {
        entry.replacement.__name__: entry.replacement
        for entry in repair.journal
        if isinstance(entry.slot.owner, type) or entry.slot.name == "cell_contents"
    }
    for instance in repair.fix.in_window():
        keep_until_window_ends(instance, methods)
    replace.take_out(replace.standing(repair.journal))
    repair.journal.clear()
