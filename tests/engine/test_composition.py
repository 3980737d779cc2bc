"""Any subset of DeepSpeed's fixes applies and leaves again, whatever the others do; all of them stand side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.experiment import ROOT, SOURCE
from tests.support.releases import release

pytestmark = pytest.mark.slow

# What is applied is exactly what was asked for, with what shares its fix; and taken back, every function is as it was.
SCRIPT = """
import itertools, json, sys
from types import ModuleType
from tests.support import experiment
untouched = ModuleType("untouched")
untouched.__path__ = [str(experiment.SOURCE / "trainfix")]
sys.modules["untouched"] = untouched
experiment._start()
from trainfix.engine.decide import load_fix
from trainfix.engine import replace
import trainfix

def applied():
    return sorted(record.id for record in trainfix.status() if record.state == "applied")

everything = applied()
names = {record.fix for record in trainfix.status() if record.state == "applied"}
members = {name: sorted(set(load_fix(name).advisories) & set(everything)) for name in sorted(names)}
paths = [target.path for name in names for target in load_fix(name).targets + load_fix(name).relies_on]
paths += [guard.path for name in names for guard in load_fix(name).guards]

def found(path):
    try:
        return replace.resolve(path)[1]
    except replace.Missing:
        return None

def live():
    return {path: found(path) for path in paths}

trainfix.revert()
released = live()
wrong = []
for size in range(len(members) + 1):
    for subset in itertools.combinations(members, size):
        ids = [members[name][0] for name in subset]
        if ids:
            trainfix.apply(*ids)
        for name in set(members) - set(subset):
            trainfix.revert(*members[name])
        wanted = sorted(id for name in subset for id in members[name])
        if applied() != wanted:
            wrong.append([subset, applied(), wanted])
        trainfix.revert()
        if any(live()[path] is not released[path] for path in paths):
            wrong.append([subset, [path for path in paths if live()[path] is not released[path]]])
trainfix.apply()
print(json.dumps({"fixes": sorted(members), "everything": everything, "again": applied(), "wrong": wrong}))
"""

FIXES = {
    "0.17.6": ["accumulator_reduction", "offload_accumulation", "partition_accumulation", "stage1_overlap"],
    "0.18.3": ["accumulator_reduction", "offload_accumulation", "stage1_overlap", "stage3_accumulation"],
    "0.18.9": ["accumulator_reduction", "bf16_boundary", "offload_accumulation", "stage1_overlap"],
}


@pytest.mark.parametrize("version", FIXES)
def test_any_subset_of_the_fixes_applies_and_leaves_without_a_trace(version: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRAINFIX")}
    paths = os.pathsep.join([str(release(version)), str(SOURCE), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import trainfix\n" + SCRIPT],
        env=environment | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "TRAINFIX_QUIET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {f"deepspeed.{name}" for name in FIXES[version]} <= set(found["fixes"])
    assert found["wrong"] == []
    assert found["again"] == found["everything"]
