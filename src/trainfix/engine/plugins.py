"""Fixes that third parties ship, for packages of theirs or of anybody's.

**The contract.** A distribution names, in the entry-point group ``trainfix.fixes``, a module (or any object) that has:

- ``FIX``: a `trainfix.engine.contract.Fix`; its docstring says what each field is, and DESIGN what a fix may do.
  `FIX.name` is a name that no other fix has (``acme.loss``), `FIX.package` the package that is repaired.
- ``RECORDS``: a list of advisories, each a dictionary in the form of the files in ``trainfix/advisories/records``: OSV,
  with ours under ``database_specific.trainfix``. One for each id in `FIX.advisories`, of the package `FIX.package`,
  with ``"fix": FIX.name``. The ids are ``PREFIX-NUMBER`` (``ACME-0001``) with a prefix of your own, never ``TF``.

In pyproject.toml::

    [project.entry-points."trainfix.fixes"]
    acme = "acme_fixes.loss"

Shapes for the records and the targets come from ``trainfix.environment.shapes.shape_in_text(source, "Class.method")``.

**What happens.** The group is read once per process, when torch has been imported, never at ``import trainfix``; so the
module must not import torch, nor what it repairs, at its top: `FIX.build` is called when that is there. From then on
these fixes are like trainfix's own: they are decided by shape, journalled, guarded, agreed upon among ranks, undone by
`trainfix.revert`, named in TRAINFIX_DISABLE, listed by `trainfix.status` and in the stamp of a checkpoint. The command
line does not know them: it imports nothing that it examines.

**What is refused.** One that cannot be imported or breaks these rules, has an id or a name that is taken, replaces a
function that another fix replaces (in the same shape) or guards, or guards one that another replaces, is left out, with
one warning on the first rank, and everything else goes on. `FIX.repairs`, `own`, `group` and `in_window` that raise
count as False, None, None and none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import wraps
from typing import Any, get_args

from trainfix import advisories
from trainfix.advisories import Advisory, Evidence, Severity, UnknownAdvisory
from trainfix.engine import decide, finder, report
from trainfix.engine.contract import Fix
from trainfix.engine.targets import TARGETS
from trainfix.settings import is_of_third_party

GROUP = "trainfix.fixes"

_theirs: dict[str, Advisory] = {}
_scanned = False


class Unusable(ValueError):
    """What an entry point names is no fix by the contract above. The message says what is wrong, and what to do."""


@dataclass(frozen=True)
class _Plugin:
    fix: Fix
    advisories: tuple[Advisory, ...]


def load_all() -> tuple[Advisory, ...]:
    """Every advisory of the catalogue, then those of third parties that this process has found."""
    return (*advisories.load_all(), *_theirs.values())


def load(id: str) -> Advisory:
    """The advisory with this id. Raises UnknownAdvisory, listing the valid ids, or RecordError."""
    if id in _theirs:
        return _theirs[id]
    try:
        return advisories.load(id)
    except UnknownAdvisory as error:
        if id.partition("-")[0] in {one.id.partition("-")[0] for one in advisories.load_all()}:
            raise
        late = "" if _scanned else "; theirs are looked for when torch is imported"
        raise UnknownAdvisory(f"{error}; of third parties: {', '.join(_theirs) or 'none'}{late}") from None


def scan() -> None:
    """Find and register the fixes of all installed distributions, once per process. Raises nothing of theirs."""
    global _scanned
    if _scanned:
        return
    _scanned = True
    try:
        new = dict.fromkeys(module for name, entry, by in _entries() for module in _registered(name, entry, by))
        foreign = {id for id in finder.current.disabled if is_of_third_party(id)}
        unknown = sorted(foreign - _all_ids()) if foreign else []
    except Exception as error:  # some distribution's metadata is broken
        report.warn(f"trainfix: cannot look for the fixes of third parties: {type(error).__name__}: {error}")
        return
    if unknown:
        report.warn(f"trainfix: TRAINFIX_DISABLE names {', '.join(unknown)}, and no fix of {GROUP} here repairs that")
    finder.catch_up(tuple(new))


def _entries() -> list[tuple[str, Any, str]]:
    """(name, entry point, distribution and version) of each in our group."""
    from importlib.metadata import entry_points

    found = entry_points(group=GROUP)
    return [(one.name, one, f"{one.dist.name} {one.dist.version}" if one.dist else "unknown 0") for one in found]


def _registered(name: str, entry: Any, by: str) -> tuple[str, ...]:
    """Register one, and return the modules that it looks at; none if it is left out."""
    try:
        plugin = _checked(entry.load())
    except (Exception, SystemExit) as error:  # whatever their module does while it is imported
        trouble = str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
        report.warn(f"trainfix: the fix {name!r} of {by} is left out: {trouble}")
        return ()
    fix = _forgiving(plugin.fix, by)
    modules = tuple(sorted(fix.modules | {guard.module for guard in fix.guards}))
    decide.register(fix, by)
    _theirs.update({one.id: one for one in plugin.advisories})
    for module in modules:
        TARGETS[module] = (*TARGETS.get(module, ()), fix.name)
    TARGETS.setdefault(fix.package, ())  # the summary waits until the whole package is imported
    return (*modules, fix.package)


def _checked(found: Any) -> _Plugin:
    fix, records = getattr(found, "FIX", None), getattr(found, "RECORDS", None)
    if not isinstance(fix, Fix):
        raise Unusable(f"FIX is {_kind(fix)}; it must be a trainfix.engine.contract.Fix")
    if not isinstance(records, (list, tuple)) or not all(isinstance(one, dict) for one in records):
        raise Unusable(f"RECORDS is {_kind(records)}; it must be a list of OSV records, one for each of its advisories")
    known = tuple(_advisory(record, fix) for record in records)
    ids = [one.id for one in known]
    if sorted(ids) != sorted(fix.advisories) or len(set(ids)) < len(ids) or not ids:
        raise Unusable(
            f"RECORDS are of {sorted(ids)}, and FIX.advisories are {sorted(fix.advisories)}: they must agree"
        )
    if taken := sorted(set(ids) & _all_ids()):
        raise Unusable(f"the id {taken[0]} is taken by another fix; use a prefix of your own")
    guarded = {id for guard in fix.guards for id in guard.reached}
    if not guarded <= set(ids):
        raise Unusable(f"its guards are of {sorted(guarded)}, and FIX.advisories are {sorted(ids)}")
    _check_modules(fix, known)
    _check_neighbours(fix)
    return _Plugin(fix, known)


def _advisory(record: dict[str, Any], fix: Fix) -> Advisory:
    from packaging.version import Version

    id = record.get("id")
    if not isinstance(id, str) or not is_of_third_party(id):
        raise Unusable(f"the id {id!r} is not PREFIX-NUMBER in capitals, with a prefix of your own (TF is trainfix's)")
    try:
        advisory = advisories.parse(record)
        for version in (advisory.introduced, advisory.last_run):
            Version(version)
        fields = [advisory.ways_out[key] for key in ("upgrade", "config")]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Unusable(f"the record {id} is incomplete ({type(error).__name__}: {error})") from error
    if not all(field is None or isinstance(field, str) for field in fields):
        raise Unusable(f"the record {id}: ways_out must be texts")
    if advisory.severity not in get_args(Severity) or advisory.evidence_level not in get_args(Evidence):
        valid = f"{', '.join(get_args(Severity))}; {', '.join(get_args(Evidence))}"
        raise Unusable(f"the record {id}: severity or evidence_level means nothing; valid: {valid}")
    if (advisory.package, advisory.fix, advisory.through) != (fix.package, fix.name, None):
        raise Unusable(f"the record {id} must be of {fix.package!r}, with the fix {fix.name!r} and without `through`")
    return advisory


def _check_modules(fix: Fix, known: tuple[Advisory, ...]) -> None:
    looked_at = {path.partition(":")[0] for one in known for path in one.evidence}
    if not looked_at <= fix.modules:
        late = ", ".join(sorted(looked_at - fix.modules))
        raise Unusable(f"the evidence is in {late}, which the fix does not wait for: add a function of it to relies_on")


def _check_neighbours(fix: Fix) -> None:
    """Nobody replaces what another fix replaces or guards. Only the fixes of the same modules can be in the way."""
    for what, name in (("name", fix.name), ("package", fix.package)):
        if not (name.isascii() and all(part.isidentifier() for part in name.replace("-", "_").split("."))):
            raise Unusable(f"the {what} {name!r} is not one; write it like a module's: acme.loss")
    if fix.name in {name for names in TARGETS.values() for name in names}:
        raise Unusable(f"the name {fix.name!r} is taken by another fix")
    replaced = {(target.path, shape) for target in fix.targets for shape in target.shapes}
    guarded = {guard.path for guard in fix.guards}
    modules = {target.module for target in fix.targets} | {guard.module for guard in fix.guards}
    for name in sorted({name for module in modules for name in TARGETS.get(module, ())}):
        other = decide.load_fix(name)
        theirs = {(target.path, shape) for target in other.targets for shape in target.shapes}
        taken = {path for path, _ in replaced & theirs}
        taken |= {path for path, _ in replaced} & {guard.path for guard in other.guards}
        taken |= guarded & {path for path, _ in theirs}
        if taken:
            raise Unusable(f"{min(taken)} is taken by the fix {name!r}, which repairs {', '.join(other.advisories)}")


def _all_ids() -> set[str]:
    return {one.id for one in load_all()}


def _kind(thing: Any) -> str:
    return "missing" if thing is None else f"of type {type(thing).__name__}"


def _forgiving(fix: Fix, by: str) -> Fix:
    """The fix with predicates that cannot break the constructor of the object that they look at."""

    def calm(function: Callable[..., Any], otherwise: Any) -> Callable[..., Any]:
        @wraps(function)
        def asked(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                what = getattr(function, "__qualname__", "a predicate")
                report.warn(f"trainfix: {what} of the fix {fix.name!r} of {by} failed: {type(error).__name__}: {error}")
                return otherwise

        return asked

    return with_fields(
        fix,
        repairs=calm(fix.repairs, False),
        own=calm(fix.own, None),
        group=calm(fix.group, None),
        in_window=calm(fix.in_window, ()),
    )
