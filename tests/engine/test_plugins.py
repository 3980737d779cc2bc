"""Fixes of third parties: found when torch is imported, treated like ours, and harmless when they are broken.

A distribution `acme-fixes` is installed in a folder: its metadata with the entry point, and the module that it names.
It repairs `acme_trainer`, which is there too. A module torch.py without content stands for torch where the real one
would only cost time; one test takes the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import standin
from trainfix import settings
from trainfix.environment.checkpoints import read
from trainfix.environment.shapes import shape_in_text

TRAINER = '''
class Trainer:
    def __init__(self, steps=4):
        self.steps = steps

    def total(self, values):
        """The sum of a window."""
        return values[0] + values[-1]
'''
SHAPE = shape_in_text(TRAINER, "Trainer.total")

FIXES = '''
"""Every value of a window counts."""

import json
from functools import wraps
from pathlib import Path

from trainfix.engine.contract import Fix, Guard, Target

TOTAL = "acme_trainer:Trainer.total"


def build(originals, advisories):
    @wraps(originals[TOTAL])
    def whole(self, values):
        return sum(values)

    return {{TOTAL: whole}}


def looks_after(trainer):
    return type(trainer).__name__ == "Trainer"


FIX = Fix(
    name="acme.total",
    package="acme_trainer",
    advisories=("ACME-0001",),
    requires={{"acme_trainer": ">=1"}},
    targets=(Target(TOTAL, frozenset({{{shape!r}}})),),
    relies_on=(),
    guards=(Guard("acme_trainer:Trainer.__init__", {{"ACME-0001": lambda trainer: "steps"}}),),
    build=build,
    repairs=looks_after,
    group=lambda trainer: None,
)
RECORDS = json.loads(Path(__file__).with_name("acme_records.json").read_text())
'''


def record(**changes: Any) -> dict[str, Any]:
    """The advisory ACME-0001; `changes` go into trainfix's part of it."""
    ours = {
        "severity": "gradient",
        "evidence_level": "proved",
        "fix": "acme.total",
        "proof": None,
        "last_run": "1.0",
        "evidence": {"acme_trainer:Trainer.total": {"affected": {SHAPE: "1.0"}}},
        "triggers": [],
        "ways_out": {"upgrade": None, "config": "set steps to 1"},
        "source_patches": [],
        "url": "https://example.org/ACME-0001",
        **changes,
    }
    return {
        "id": "ACME-0001",
        "modified": "2026-11-29T00:00:00Z",
        "summary": "windows lose their middle",
        "details": "windows lose their middle",
        "affected": [
            {
                "package": {"ecosystem": "PyPI", "name": "acme_trainer"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "1.0"}]}],
                "versions": ["1.0"],
            }
        ],
        "references": [],
        "database_specific": {"trainfix": ours},
    }


def install(folder: Path, name: str, version: str, entry: str = "") -> None:
    """A distribution's metadata."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry:
        (metadata / "entry_points.txt").write_text(f"[trainfix.fixes]\n{entry}\n")


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """A folder with the package that has the error, its fix, and a module torch."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "torch.py").write_text("")
    (folder / "acme_trainer.py").write_text(TRAINER)
    (folder / "acme_fixes.py").write_text(FIXES.format(shape=SHAPE))
    (folder / "acme_records.json").write_text(json.dumps([record()]))
    install(folder, "acme_trainer", "1.0")
    install(folder, "acme-fixes", "0.3", "acme = acme_fixes")
    return folder


def python(folder: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh interpreter that has `folder` on its path."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRAINFIX")}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | {"PYTHONPATH": os.pathsep.join([str(folder), str(standin.SOURCE)])} | env,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def said(folder: Path, script: str, **env: str) -> str:
    """What is said while `script` runs to its end."""
    done = python(folder, script, **env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def answer(folder: Path, script: str, **env: str) -> Any:
    """What the script leaves in `answer`."""
    done = python(folder, script + "\nimport json; print(json.dumps(answer))", **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WORKS = "acme_trainer.Trainer().total([1, 2, 3]) == 6"
THEIRS = "[[r.id, r.state, r.fix, r.installed, r.reason] for r in trainfix.status() if not r.id.startswith('TF-')]"
APPLIED = [["ACME-0001", "applied", "acme.total", "1.0", ""]]


# --- one that works --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        "import trainfix, torch, acme_trainer",
        "import torch, trainfix, acme_trainer",
        "import torch, acme_trainer, trainfix",
        "import acme_trainer, trainfix, torch",
        "import trainfix, acme_trainer, torch",
    ],
)
def test_the_order_of_the_imports_does_not_matter(order: str, acme: Path) -> None:
    assert answer(acme, f"{order}\nanswer = [{WORKS}, {THEIRS}]") == [True, APPLIED]


def test_it_is_announced_like_ours(acme: Path) -> None:
    words = said(acme, "import trainfix, torch, acme_trainer")
    assert words == "trainfix 0.1.0: ACME-0001 applied (acme_trainer 1.0)\n"


def test_nothing_is_looked_for_before_torch_is_imported(acme: Path) -> None:
    (acme / "acme_fixes.py").write_text("raise SystemExit('imported')")
    script = "import trainfix, sys, acme_trainer\n"
    script += "answer = [name in sys.modules for name in ('importlib.metadata', 'acme_fixes')]"
    assert answer(acme, script) == [False, False]
    assert "'acme'" in said(acme, "import trainfix, torch")
    assert said(acme, "import trainfix, torch", TRAINFIX="off") == ""


def test_it_waits_for_its_package(acme: Path) -> None:
    waiting = [["ACME-0001", "waiting", "acme.total", "1.0", "acme_trainer is not imported yet"]]
    assert answer(acme, f"import trainfix, torch\nanswer = {THEIRS}") == waiting


def test_an_unknown_body_is_refused_and_a_run_that_reaches_it_stops(acme: Path) -> None:
    (acme / "acme_trainer.py").write_text(TRAINER.replace("values[0] +", "0 + values[0] +"))
    evidence = {"acme_trainer:Trainer.__init__": {"affected": {shape_in_text(TRAINER, "Trainer.__init__"): ""}}}
    (acme / "acme_records.json").write_text(json.dumps([record(evidence=evidence)]))
    done = python(acme, "import trainfix, torch, acme_trainer\nacme_trainer.Trainer()")
    assert done.returncode == 1
    assert "ACME-0001 refused (acme_trainer 1.0): Trainer.total has an unknown body" in done.stderr
    assert "UnfixedBugError: ACME-0001 is reached and not repaired: windows lose their middle." in done.stderr


def test_it_can_be_reverted_and_applied_by_its_id(acme: Path) -> None:
    script = f"""
import trainfix, torch, acme_trainer
back = trainfix.revert("ACME-0001")
broken = {WORKS}
(record,) = trainfix.apply("ACME-0001")
answer = [back, broken, record.state, {WORKS}]
"""
    assert answer(acme, script) == [["ACME-0001"], False, "applied", True]


def test_its_id_disables_it(acme: Path) -> None:
    disabled = [["ACME-0001", "disabled", "acme.total", "1.0", "TRAINFIX_DISABLE"]]
    script = f"import trainfix, torch, acme_trainer\nanswer = [{WORKS}, {THEIRS}]"
    assert answer(acme, script, TRAINFIX_DISABLE="acme-0001,TF-0001") == [False, disabled]
    assert said(acme, script, TRAINFIX_DISABLE="ACME-0001") == ""


def test_an_id_that_nobody_has_is_one_warning_once_torch_is_imported(acme: Path) -> None:
    assert said(acme, "import trainfix", TRAINFIX_DISABLE="ACME-0002") == ""
    words = said(acme, "import trainfix, torch", TRAINFIX_DISABLE="ACME-0002,ACME-0001,OTHER-1")
    assert words == (
        "trainfix: TRAINFIX_DISABLE names ACME-0002, OTHER-1, and no fix of trainfix.fixes here repairs that\n"
    )


@pytest.mark.parametrize("value", ["TF-0999", "ACME", "ACME-", "-1", "AC ME-1", "ACME-1a", "É-1"])
def test_an_id_that_nobody_can_have_is_still_an_error(value: str) -> None:
    with pytest.raises(settings.SettingsError, match="no such advisory"):
        settings.read({"TRAINFIX_DISABLE": value})


def test_asking_for_it_too_early_says_when_it_will_be_known(acme: Path) -> None:
    done = python(acme, "import trainfix\ntrainfix.apply('ACME-0001')")
    assert done.stderr.endswith("; of third parties: none; theirs are looked for when torch is imported\n")
    done = python(acme, "import trainfix, torch\ntrainfix.apply('ACME-0009')")
    assert done.stderr.endswith("; of third parties: ACME-0001\n")


def test_an_object_that_an_entry_point_names_inside_a_module_will_do(acme: Path) -> None:
    install(acme, "acme-fixes", "0.3", "acme = acme_object:Offer")
    (acme / "acme_object.py").write_text(
        "import acme_fixes\nclass Offer:\n    FIX = acme_fixes.FIX\n    RECORDS = acme_fixes.RECORDS\n"
    )
    assert answer(acme, f"import trainfix, torch, acme_trainer\nanswer = {THEIRS}") == APPLIED


def test_a_checkpoint_says_which_distribution_repaired_it(acme: Path, tmp_path: Path) -> None:
    script = f"""
import trainfix, torch
from trainfix.engine import stamp
stamp.PLACES["acme_trainer"] = (stamp.Place("acme_trainer:Trainer.__init__", lambda call, saved: [{str(tmp_path)!r}]),)
import acme_trainer
acme_trainer.Trainer()
"""
    assert "no trainfix.json" not in said(acme, script)
    found = read(str(tmp_path))
    assert found.ids == {"ACME-0001"}
    assert (found.packages["acme-fixes"], found.packages["acme_trainer"]) == ("0.3", "1.0")


def test_ranks_agree_only_with_the_same_release_of_it(acme: Path) -> None:
    script = """
import trainfix, torch, acme_trainer
from trainfix.engine import agreement
published = []
agreement.disagreement = lambda name, digest, group: published.append(digest)
acme_trainer.Trainer()
answer = published
"""
    digest = "trainfix 0.1.0 with acme-fixes 0.3 acme.total (ACME-0001) on acme_trainer 1.0"
    assert answer(acme, script) == [digest]


def test_predicates_that_raise_do_not_reach_the_users_constructor(acme: Path) -> None:
    text = FIXES.format(shape=SHAPE)
    (acme / "acme_fixes.py").write_text(
        text.replace('return type(trainer).__name__ == "Trainer"', "return trainer.nothing")
    )
    script = "import trainfix, torch, acme_trainer\nacme_trainer.Trainer(); acme_trainer.Trainer()"
    words = said(acme, script, TRAINFIX="warn")
    failed = "trainfix: looks_after of the fix 'acme.total' of acme-fixes 0.3 failed: AttributeError"
    assert words.count(failed) == 1


# --- broken ones -----------------------------------------------------------------------------------------------------

SECOND = "from acme_fixes import *\nimport dataclasses\nFIX = dataclasses.replace(FIX, {})\nRECORDS = {}\n"


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("import gone_for_good", "ModuleNotFoundError: No module named 'gone_for_good'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("this is no Python", "SyntaxError: invalid syntax (acme_fixes.py, line 1)"),
        ("", "FIX is missing; it must be a trainfix.engine.contract.Fix"),
        ("FIX = RECORDS = {}", "FIX is of type dict; it must be a trainfix.engine.contract.Fix"),
    ],
)
def test_a_broken_one_is_reported_once_and_harms_nothing(text: str, trouble: str, acme: Path) -> None:
    (acme / "acme_fixes.py").write_text(text)
    words = said(acme, f"import trainfix, torch, acme_trainer\nassert not {WORKS} and {THEIRS} == []")
    assert words == f"trainfix: the fix 'acme' of acme-fixes 0.3 is left out: {trouble}\n"
    assert said(acme, "import trainfix, torch", RANK="1") == ""


@pytest.mark.parametrize(
    ("records", "trouble"),
    [
        ({}, "RECORDS is of type dict; it must be a list of OSV records"),
        ([], "RECORDS are of [], and FIX.advisories are ['ACME-0001']: they must agree"),
        ([record(), record()], "RECORDS are of ['ACME-0001', 'ACME-0001'], and FIX.advisories are ['ACME-0001']"),
        ([{**record(), "id": "TF-0001"}], "the id 'TF-0001' is not PREFIX-NUMBER in capitals"),
        ([{**record(), "id": 7}], "the id 7 is not PREFIX-NUMBER in capitals"),
        ([{"id": "ACME-0001"}], "the record ACME-0001 is incomplete (KeyError: 'database_specific')"),
        ([record(ways_out={})], "the record ACME-0001 is incomplete (KeyError: 'upgrade')"),
        ([record(ways_out={"upgrade": 1, "config": ""})], "the record ACME-0001: ways_out must be texts"),
        ([record(last_run="newest")], "the record ACME-0001 is incomplete (InvalidVersion: Invalid version: 'newest')"),
        ([record(severity="awful")], "the record ACME-0001: severity or evidence_level means nothing; valid: gradient"),
        ([record(fix="other")], "the record ACME-0001 must be of 'acme_trainer', with the fix 'acme.total'"),
        ([record(through="TF-0001")], "the record ACME-0001 must be of 'acme_trainer', with the fix 'acme.total'"),
        (
            [record(evidence={"elsewhere:f": {"affected": {"0": ""}}})],
            "the evidence is in elsewhere, which the fix does not wait for",
        ),
    ],
)
def test_records_that_are_not_by_the_contract_are_reported(records: Any, trouble: str, acme: Path) -> None:
    (acme / "acme_records.json").write_text(json.dumps(records))
    words = said(acme, f"import trainfix, torch, acme_trainer\nassert not {WORKS} and {THEIRS} == []")
    assert f"trainfix: the fix 'acme' of acme-fixes 0.3 is left out: {trouble}" in words
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "records", "trouble"),
    [
        ('name="acme.again"', '[{**RECORDS[0], "id": "ACME-0001"}]', "the record ACME-0001 must be of"),
        (
            'name="acme.again", guards=()',
            '[json.loads(json.dumps(RECORDS[0]).replace("acme.total", "acme.again"))]',
            "the id ACME-0001 is taken by another fix",
        ),
        (
            'name="acme.again", advisories=("ZZ-1",), guards=()',
            '[json.loads(json.dumps(RECORDS[0]).replace("acme.total", "acme.again").replace("ACME-0001", "ZZ-1"))]',
            "acme_trainer:Trainer.total is taken by the fix 'acme.total', which repairs ACME-0001",
        ),
        (
            'advisories=("ZZ-1",), guards=()',
            '[json.loads(json.dumps(RECORDS[0]).replace("ACME-0001", "ZZ-1"))]',
            "the name 'acme.total' is taken by another fix",
        ),
        (
            'name="acme again", advisories=("ZZ-1",), guards=()',
            '[json.loads(json.dumps(RECORDS[0]).replace("acme.total", "acme again").replace("ACME-0001", "ZZ-1"))]',
            "the name 'acme again' is not one; write it like a module's",
        ),
    ],
)
def test_what_is_taken_is_refused_to_the_second_and_the_first_works(
    changes: str, records: str, trouble: str, acme: Path
) -> None:
    (acme / "zz_fixes.py").write_text(SECOND.format(changes, records))
    install(acme, "acme-fixes", "0.3", "acme = acme_fixes\nzz = zz_fixes")
    words = said(acme, f"import trainfix, torch, acme_trainer\nassert {WORKS} and {THEIRS} == {APPLIED!r}")
    assert f"trainfix: the fix 'zz' of acme-fixes 0.3 is left out: {trouble}" in words


def test_a_function_that_one_of_ours_replaces_is_taken(acme: Path) -> None:
    from trainfix.engine.decide import load_fix

    target = next(one for one in load_fix("transformers.windows").targets if one.path.endswith("training_step"))
    text = FIXES.format(shape=min(target.shapes)).replace("acme_trainer:Trainer.total", target.path)
    (acme / "acme_fixes.py").write_text(text)
    (acme / "acme_records.json").write_text(json.dumps([record(evidence={target.path: {"affected": {"0": ""}}})]))
    words = said(acme, "import trainfix, torch")
    assert f"left out: {target.path} is taken by the fix 'transformers.windows', which repairs TF-0402" in words


def test_a_build_that_raises_is_failed_like_one_of_ours(acme: Path) -> None:
    text = FIXES.format(shape=SHAPE).replace("    @wraps(originals", "    raise OSError('no')\n\n    @wraps(originals")
    (acme / "acme_fixes.py").write_text(text)
    done = python(acme, f"import trainfix, torch, acme_trainer\nassert {THEIRS}[0][1] == 'failed'\n{WORKS}")
    assert "ACME-0001 failed (acme_trainer 1.0): the repair could not be put in place: OSError: no" in done.stderr
    assert "UnfixedBugError: ACME-0001 is reached and not repaired" in done.stderr


def test_metadata_that_cannot_be_read_is_reported(acme: Path) -> None:
    (acme / "acme_fixes-0.3.dist-info" / "entry_points.txt").write_bytes(b"[trainfix.fixes]\n\xff = x\n")
    words = said(acme, "import trainfix, torch, acme_trainer")
    assert words.startswith("trainfix: cannot look for the fixes of third parties: ")


@pytest.mark.slow
def test_the_real_torch_brings_them_too(acme: Path) -> None:
    (acme / "torch.py").unlink()
    assert answer(acme, f"import trainfix, torch, acme_trainer\nanswer = [{WORKS}, {THEIRS}]") == [True, APPLIED]
