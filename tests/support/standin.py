"""A small package with two silent errors, and the fix and the advisories for it: the engine is what is tested with it.

`write(folder, "affected")` puts the package (with metadata), its fix and its records there. In a fresh interpreter,
before trainfix is imported, `arm(folder)` makes trainfix know exactly these: the records, the ids, the table of targets
and the fix take the places of trainfix's own. `python(folder, script)` does all of that and runs a script.

The package imitates what makes DeepSpeed hard to repair: a method inside a decorator that sets no ``__wrapped__``, a
module function that others took with ``from standin.functions import total``, and a circular import that can bring in
trainfix while ``standin.core`` is half imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

IDS = ("SI-0001", "SI-0002")
MODULES = ("standin.core", "standin.functions")
TOTAL, KEEP, BACKWARD, STEP, CHECK = (
    "standin.functions:total",
    "standin.core:Engine.keep",
    "standin.core:Engine.backward",
    "standin.core:Engine.step",
    "standin.core:Engine.check",
)

# SI-0001: the sum of a window has only its first and last value.  SI-0002: every value is rounded.
_TOTAL = {
    "affected": "values[0] + values[-1]",
    "fixed": "sum(values)",
    "patched": "sum(list(values))",
    "unknown": "values[0] + values[-1] + 0",
}
_KEEP = {"affected": "round(value)", "fixed": "value", "patched": "float(value)", "unknown": "int(value)"}

# release -> version, body of total, body of keep, body of check (which the fix relies on)
RELEASES = {
    "old": ("1.0", "unknown", "unknown", "known"),
    "affected": ("2.0", "affected", "affected", "known"),
    "half": ("2.1", "affected", "fixed", "known"),  # only SI-0001
    "unknown": ("2.2", "unknown", "affected", "known"),  # the evidence of SI-0001
    "neighbour": ("2.3", "affected", "affected", "unknown"),  # what the fix relies on
    "patched": ("2.0", "patched", "patched", "known"),
    "fixed": ("3.0", "fixed", "fixed", "known"),
    "newer": ("9.0", "unknown", "unknown", "known"),
}

_FUNCTIONS = '''
def total(values):
    """The sum of a window."""
    return {total}
'''

_CORE = '''
from standin import plugin  # a circle: plugin imports this module, which is half imported then
from standin.deepspeed.utils.nvtx import instrument_w_nvtx
from standin.functions import total


class Engine:
    def __init__(self, steps=4):
        self.steps = steps
        self.values = []

    def keep(self, value):
        """One value of the window."""
        self.values.append({keep})

    @instrument_w_nvtx
    def backward(self, value):
        self.keep(value)
        return -len(self.values)

    def step(self):
        result = total(self.values)
        self.values.clear()
        return result

    def check(self):
        {check}

    def boundary(self, is_boundary):
        return is_boundary


class Other(Engine):
    """Inherits the errors, and no repair looks after it."""
'''

_PLUGIN = """
import importlib
import os

from standin import core

# Whatever a real plugin might bring in, in the middle of its host's import.
if os.environ.get("STANDIN_PLUGIN"):
    importlib.import_module(os.environ["STANDIN_PLUGIN"])
"""

_NVTX = """
def instrument_w_nvtx(func):
    def wrapped_fn(*args, **kwargs):
        return func(*args, **kwargs)

    return wrapped_fn
"""

_FIX = '''
"""The fix of the stand-in."""

import os
from functools import wraps
from weakref import WeakSet

from trainfix.engine.contract import Fix, Guard, Target, window_ended

SHAPES = {shapes!r}
_begun = WeakSet()


def build(originals, advisories):
    if os.environ.get("STANDIN_TROUBLE") == "raise":
        raise ValueError("the fix is in a bad mood")

    total, keep, backward, step = (originals[path] for path in {targets!r})

    @wraps(total)
    def whole_total(values):
        return sum(values)

    @wraps(keep)
    def exact_keep(self, value):
        _begun.add(self)
        self.values.append(value)

    @wraps(backward)
    def counted_backward(self, value):
        return -backward(self, value)

    @wraps(step)
    def renewing_step(self):
        result = step(self)
        _begun.discard(self)
        window_ended(self)
        return result

    made = dict(zip({targets!r}, (whole_total, exact_keep, counted_backward, renewing_step)))
    if os.environ.get("STANDIN_TROUBLE") == "missing":
        made["standin.core:Engine.gone"] = exact_keep
    return made


def long_window(engine):
    if os.environ.get("STANDIN_TROUBLE") == "ask":
        raise KeyError("steps")
    return f"steps = {{engine.steps}}" if engine.steps > 2 else None


def not_a_boundary(engine, is_boundary):
    return None if is_boundary else "boundary(False)"


GUARD = os.environ.get("STANDIN_GUARD", "standin.core:Engine.__init__")
FIX = Fix(
    name="standin",
    package="standin",
    advisories={ids!r},
    requires={{"standin": ">=1.0"}},
    targets=tuple(
        Target(path, frozenset(SHAPES[path]), may_be_replaced=path.endswith(".step")) for path in {targets!r}
    ),
    relies_on=(Target("standin.core:Engine.check", frozenset(SHAPES["standin.core:Engine.check"])),),
    guards=(
        Guard(GUARD, {{"SI-0001": long_window}}),
        Guard("standin.core:Engine.boundary", {{"SI-0002": not_a_boundary}}),
    ),
    build=build,
    repairs=lambda engine: type(engine).__qualname__ == "Engine",
    group=lambda engine: None,
    in_window=lambda: list(_begun),
    own=lambda engine: "own loss: user.loss" if engine.steps == 9 else None,
)
'''

# What a user's own file does: it takes the names away at whatever moment it is imported.
_USER = "from standin.core import Engine\nfrom standin.functions import total\n"


def write(folder: Path, name: str = "affected", *, severity: str = "gradient", level: str = "proved") -> Path:
    """Put the release `name` of the stand-in, its fix, its records and four user files into `folder`; returns it.

    Writing another release into the same folder is an upgrade in place. `severity` and `level` go into the records.
    """
    version, total, keep, check = RELEASES[name]
    package = folder / "standin"
    utils = package / "deepspeed" / "utils"
    utils.mkdir(parents=True, exist_ok=True)
    for empty in (package, utils.parent, utils):
        (empty / "__init__.py").write_text("")
    (package / "functions.py").write_text(_functions(total))
    (package / "core.py").write_text(_core(keep, check))
    (package / "plugin.py").write_text(_PLUGIN)
    (utils / "nvtx.py").write_text(_NVTX)
    for old in folder.glob("standin-*.dist-info/METADATA"):
        old.unlink()
        old.parent.rmdir()
    metadata = folder / f"standin-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: standin\nVersion: {version}\n")
    for number in range(4):
        (folder / f"user{number}.py").write_text(_USER)
    _write_fix_and_records(folder, severity, level)
    return folder


def lean(folder: Path, *, needs: str, through: str = "SI-0001") -> Path:
    """Put a second package there, whose advisory SI-0003 is an error of the stand-in's releases that `needs` names, and
    repaired through `through`; returns the folder."""
    metadata = folder / "leaning-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: leaning\nVersion: 1.0\n")
    record = _record("SI-0003", "gradient", "proved", {})
    record["affected"][0] |= {"package": {"ecosystem": "PyPI", "name": "leaning"}, "versions": ["1.0"]}
    record["affected"][0]["ranges"][0]["events"] = [{"introduced": "1.0"}, {"last_affected": "1.0"}]
    ours = record["database_specific"]["trainfix"]
    ours |= {"fix": None, "last_run": "1.0", "needs": {"standin": needs}, "through": through}
    (folder / "records" / "SI-0003.json").write_text(json.dumps(record))
    return folder


def _functions(total: str) -> str:
    return _FUNCTIONS.format(total=_TOTAL[total])


def _core(keep: str, check: str) -> str:
    return _CORE.format(keep=_KEEP[keep], check={"known": "return True", "unknown": "return 1"}[check])


def _write_fix_and_records(folder: Path, severity: str, level: str) -> None:
    from trainfix.environment.shapes import shape_in_text

    known = _core("affected", "known")
    shapes = {path: [shape_in_text(known, path.partition(":")[2])] for path in (KEEP, BACKWARD, STEP, CHECK)}
    shapes[KEEP].append(shape_in_text(_core("fixed", "known"), "Engine.keep"))
    shapes[TOTAL] = [shape_in_text(_functions("affected"), "total")]
    fix = _FIX.format(shapes=shapes, targets=(TOTAL, KEEP, BACKWARD, STEP), ids=IDS)
    (folder / "fix_of_standin.py").write_text(fix)
    records = folder / "records"
    records.mkdir(exist_ok=True)
    bodies = ("affected", "fixed", "patched")
    evidence = {
        "SI-0001": (TOTAL, {body: shape_in_text(_functions(body), "total") for body in bodies}),
        "SI-0002": (KEEP, {body: shape_in_text(_core(body, "known"), "Engine.keep") for body in bodies}),
    }
    for id, (path, found) in evidence.items():
        record = _record(id, severity, level, {path: {body: {shape: ""} for body, shape in found.items()}})
        (records / f"{id}.json").write_text(json.dumps(record))


def _record(id: str, severity: str, level: str, evidence: dict[str, Any]) -> dict[str, Any]:
    ours = {
        "severity": severity,
        "evidence_level": level,
        "fix": "standin",
        "proof": None,
        "last_run": "3.0",
        "evidence": evidence,
        "triggers": [{"key": "steps", "at_least": 3}],
        "ways_out": {"upgrade": "3.0", "config": "set steps to 1 or 2"},
        "hazards": ["clipping has another default from 3.0"],
        "source_patches": [],
        "url": f"https://example.org/{id}",
    }
    affected = {
        "package": {"ecosystem": "PyPI", "name": "standin"},
        "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "2.0"}, {"fixed": "3.0"}]}],
        "versions": ["2.0", "2.1", "2.2", "2.3"],
    }
    text = {"SI-0001": "windows lose their middle", "SI-0002": "values are rounded", "SI-0003": "leans on them"}[id]
    return {
        "id": id,
        "modified": "2026-11-23T00:00:00Z",
        "summary": text,
        "details": text,
        "affected": [affected],
        "references": [],
        "database_specific": {"trainfix": ours},
    }


# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.


class FixFinder:
    """Finds trainfix.fixes.standin in the stand-in's folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "fix_of_standin.py"

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != "trainfix.fixes.standin":
            return None
        return importlib.util.spec_from_file_location(name, self.file)


def arm(folder: Path) -> None:
    """Make the trainfix that this interpreter is about to import know the stand-in, and nothing else."""
    assert "trainfix" not in sys.modules, "trainfix must not be imported yet"
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, FixFinder(folder))
    _preset("trainfix.engine.targets", "engine/targets.py").TARGETS = dict.fromkeys(MODULES, ("standin",))
    ids = tuple(sorted(file.stem for file in (folder / "records").glob("*.json")))
    _preset("trainfix.settings", "settings.py").ADVISORY_IDS = ids
    _preset("trainfix.advisories", "advisories/__init__.py").RECORDS = folder / "records"


def _preset(name: str, file: str) -> Any:
    """Load one of trainfix's own modules without trainfix's activating __init__, which will find it loaded."""
    spec = importlib.util.spec_from_file_location(name, SOURCE / "trainfix" / file)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def states() -> dict[str, str]:
    """id -> state, from `trainfix.status`."""
    import trainfix

    return {record.id: record.state for record in trainfix.status()}


def works() -> dict[str, bool]:
    """Which of the four functions behave as repaired, as a new engine and the functions' own module show it."""
    from standin.core import Engine
    from standin.functions import total

    engine = Engine(2)
    counted = engine.backward(1.5)
    return {"total": total([1, 2, 3]) == 6, "keep": engine.values == [1.5], "backward": counted == 1}


# ---------------------------------------------------------------------------------------------------------------------
# In the test again.


def python(folder: Path, script: str, *, timeout: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh interpreter that knows the stand-in; `env` is added to its environment."""
    preamble = f"from pathlib import Path; from tests.support import standin; standin.arm(Path({str(folder)!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", preamble + script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), str(ROOT)])} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer(folder: Path, script: str, **env: str) -> Any:
    """What `script` left in its variable `answer` (through JSON). Fails with the child's words if it fails."""
    done = python(folder, script + "\nimport json; print(json.dumps(answer))", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
