"""The engine's table of target modules, and what it may assume about every fix."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

import trainfix.fixes
from tests.support import standin
from trainfix.advisories import load, load_all
from trainfix.engine.contract import Fix, Guard, Target
from trainfix.engine.decide import load_fix, targets_of
from trainfix.engine.targets import TARGETS


def fixes() -> list[Fix]:
    """Every fix under trainfix.fixes: each module there that has one; the others are what fixes share."""
    root = Path(trainfix.fixes.__path__[0])
    folders = [root / info.name for info in pkgutil.iter_modules([str(root)]) if info.ispkg]
    names = [f"{folder.name}.{info.name}" for folder in folders for info in pkgutil.iter_modules([str(folder)])]
    return [load_fix(name) for name in names if hasattr(import_module(f"trainfix.fixes.{name}"), "FIX")]


every_fix = pytest.mark.parametrize("fix", fixes(), ids=lambda fix: fix.name)


def test_the_table_names_exactly_the_modules_that_the_fixes_look_at() -> None:
    expected: dict[str, set[str]] = {}
    for fix in fixes():
        for module in fix.modules | {guard.module for guard in fix.guards}:
            expected.setdefault(module, set()).add(fix.name)
    expected |= {fix.package: set[str]() for fix in fixes()}
    assert {module: set(names) for module, names in TARGETS.items()} == expected
    assert list(TARGETS)[-len({fix.package for fix in fixes()}) :] == sorted({fix.package for fix in fixes()})
    assert all(len(set(names)) == len(names) for names in TARGETS.values())


def test_every_advisory_with_a_fix_is_one_that_the_fix_repairs() -> None:
    assert fixes()
    repaired = {(id, fix.name) for fix in fixes() for id in fix.advisories}
    assert {(advisory.id, advisory.fix) for advisory in load_all() if advisory.fix} == repaired
    assert all(load(id).package == fix.package for fix in fixes() for id in fix.advisories)


@every_fix
def test_the_evidence_lies_in_modules_that_the_fix_waits_for(fix: Fix) -> None:
    paths = targets_of(fix, [load(id) for id in fix.advisories])
    assert {path.partition(":")[0] for path in paths} <= fix.modules


@every_fix
def test_every_guard_is_of_an_advisory_of_the_fix_and_every_advisory_is_guarded(fix: Fix) -> None:
    guarded = {id for guard in fix.guards for id in guard.reached}
    assert guarded == set(fix.advisories)


@every_fix
def test_no_function_is_named_twice_nor_both_replaced_and_relied_on_or_guarded(fix: Fix) -> None:
    kinds: tuple[tuple[Target | Guard, ...], ...] = (fix.targets, fix.relies_on, fix.guards)
    targets, relied_on, guarded = ([one.path for one in kind] for kind in kinds)
    assert all(len(set(paths)) == len(paths) for paths in (targets, relied_on, guarded))
    # Where nothing is replaced an event may be guarded at a target; with advisories that the same bodies decide about,
    # all alike, the two never stand together.
    known = ({path: sorted(shapes) for path, shapes in load(id).evidence.items()} for id in fix.advisories)
    alike = all(one == other for one, other in pairwise(known))
    on_targets = {guard.path for guard in fix.guards if guard.on_construction or not alike}
    assert not set(targets) & {*relied_on, *on_targets}
    assert all(target.shapes for target in fix.targets + fix.relies_on)


def test_no_two_fixes_replace_the_same_function_and_none_replaces_what_another_guards() -> None:
    replaced = [(target.path, shape, fix.name) for fix in fixes() for target in fix.targets for shape in target.shapes]
    assert len({(path, shape) for path, shape, _ in replaced}) == len(replaced)  # of different releases they may
    owners: dict[str, set[str]] = {}
    for path, _, name in replaced:
        owners.setdefault(path, set()).add(name)
    assert all(owners.get(guard.path, {fix.name}) == {fix.name} for fix in fixes() for guard in fix.guards)


@every_fix
def test_a_fix_says_what_it_repairs_and_when_it_can_go(fix: Fix) -> None:
    module = sys.modules[f"trainfix.fixes.{fix.name}"]
    assert module.__doc__ is not None
    assert all(id in module.__doc__ for id in fix.advisories)
    assert re.search("^Delete .* when ", module.__doc__, re.MULTILINE)


def test_fixes_are_loaded_without_the_packages_that_they_repair() -> None:
    script = """
import json, sys
from trainfix.engine.decide import load_fix
for name in json.loads(sys.argv[1]):
    load_fix(name)
print(json.dumps(sorted({"torch", "deepspeed", "numpy", "transformers", "wrapt"} & set(sys.modules))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([fix.name for fix in fixes()])],
        env=os.environ | {"PYTHONPATH": str(standin.SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
