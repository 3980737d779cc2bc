"""`trainfix doctor` on real releases: the verdict, what reaches it, what repairs it, and the exit code."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.releases import release
from trainfix.advisories import load
from trainfix.cli.examine import Finding

from .conftest import OFFLOADED

pytestmark = pytest.mark.usefixtures("catalogue")


def with_zero(steps: object = 8, **section: object) -> dict[str, object]:
    content = copy.deepcopy(OFFLOADED)
    content["gradient_accumulation_steps"] = steps
    content["zero_optimization"] |= section
    return content


# What DeepSpeed 0.18.9 with ZeRO-2, CPU offload and 8 steps is told.


def test_the_affected_run_is_found_with_its_reasons(trainfix, write):
    answer = trainfix("doctor", "--config", write(), "--format", "json")
    assert answer.code == 1
    report, finding = answer.json, answer.finding()
    assert report["schema"] == 1
    assert report["packages"]["deepspeed"] == "0.18.9"
    assert (report["active"], report["configs"], report["exit"]) == (False, ["ds.json"], 1)
    assert report["catalogue"].count("-") == 2
    assert finding["verdict"] == "affected"
    assert (finding["by"], finding["shape"]) == ("shape", "8f1759c219c1")
    assert finding["reachable"] == "yes"
    assert finding["because"] == [
        "zero_optimization.stage = 2 (ds.json)",
        "zero_optimization.offload_optimizer.device = cpu (ds.json)",
        "gradient_accumulation_steps = 8 (ds.json)",
    ]
    assert (finding["repair"], finding["repaired"], finding["repaired_by"]) == ("available", False, None)
    assert (finding["severity"], finding["evidence"], finding["fixed_in"]) == ("gradient", "proved", "0.19.0")
    assert any(hazard.startswith("gradient_clipping defaults to 1.0 instead of 0.0") for hazard in finding["hazards"])


def test_json_has_every_documented_key(trainfix, write):
    answer = trainfix("doctor", "--config", write(), "--format", "json")
    report = {"schema", "trainfix", "catalogue", "python", "packages", "active", "configs", "exit", "findings"}
    report |= {"hazards"}
    finding = {"id", "package", "installed", "verdict", "by", "shape", "reachable", "because", "repair", "repaired"}
    finding |= {"repaired_by", "severity", "evidence", "summary", "fixed_in", "blocked_by", "hazards", "url"}
    assert report <= set(answer.json)
    for one in answer.json["findings"]:
        assert finding <= set(one)


def test_text_says_what_is_wrong_how_to_repair_it_and_what_the_exit_code_means(trainfix, write):
    answer = trainfix("doctor", "--config", write())
    assert answer.code == 1
    assert answer.err == ""
    assert "[X]  TF-0001  ZeRO-2 with CPU offload drops every micro-batch" in answer.out
    assert "deepspeed 0.18.9: 1 to repair\n" in answer.out
    assert "gradient_accumulation_steps = 8 (ds.json)" in answer.out
    assert "add `import trainfix  # noqa: F401` to the training script" in answer.out
    assert "fixed in deepspeed 0.19.0" in answer.out
    assert "gradient_clipping defaults to 1.0" in answer.out
    assert "any other subclass is left alone" in " ".join(answer.out.split())
    assert answer.out.endswith(
        "not reached by ds.json: TF-0003\n1 to repair, 1 fine: exit 1 (something reachable is not repaired)\n"
    )
    assert "\033" not in answer.out


def test_assumed_import_repairs_it(trainfix, write):
    answer = trainfix("doctor", "--config", write(), "--assume-import", "--format", "json")
    finding = answer.finding()
    assert (answer.code, answer.json["active"]) == (0, True)
    assert (finding["verdict"], finding["repaired"], finding["repaired_by"]) == ("affected", True, "assumed import")
    text = trainfix("doctor", "--config", write(), "--assume-import").out
    assert "repaired by assumed import: TF-0001\nnot reached by ds.json: TF-0003\nall good: 2 checked" in text


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TRAINFIX", "off", "TRAINFIX=off"),
        ("TRAINFIX_DISABLE", "TF-0001", "TRAINFIX_DISABLE switches the repair of TF-0001"),
    ],
)
def test_a_repair_that_is_switched_off_repairs_nothing(trainfix, write, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    answer = trainfix("doctor", "--config", write(), "--assume-import")
    assert answer.code == 1
    assert words in answer.out


# Other releases and other configs.


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("0.14.0", "not-affected"),
        ("0.15.1", "not-affected"),
        ("0.15.2", "affected"),
        ("0.18.2", "affected"),
        ("0.19.0", "fixed-upstream"),
        ("0.19.8", "fixed-upstream"),
    ],
)
def test_verdict_by_release(trainfix, write, version, verdict):
    answer = trainfix("doctor", "--config", write(), "--only", "TF-0001", "--format", "json", installed=version)
    finding = answer.finding()
    assert (finding["installed"], finding["verdict"]) == (version, verdict)
    assert answer.code == (1 if verdict == "affected" else 0)
    if verdict != "affected":
        assert (finding["reachable"], finding["repair"]) == ("no", "none")


def test_a_repaired_release_is_all_good(trainfix, write):
    answer = trainfix("doctor", "--config", write(), installed="0.19.8")
    assert answer.code == 0
    assert answer.out.endswith("all good: 2 checked, nothing reachable is unrepaired (exit 0)\n")
    assert "not in deepspeed 0.19.8: TF-0001, TF-0003\n" in answer.out
    assert len(answer.out.splitlines()) < 12


def test_without_deepspeed_there_is_nothing_to_find(trainfix):
    answer = trainfix("doctor", installed=None)
    assert answer.code == 0
    assert "deepspeed is not installed: TF-0001, TF-0003\n" in answer.out
    json = trainfix("doctor", "--format", "json", installed=None)
    assert {one["verdict"] for one in json.json["findings"]} == {"not-installed"}


@pytest.mark.parametrize(
    ("content", "reachable", "code", "because"),
    [
        (
            with_zero(2),
            "no",
            0,
            "gradient_accumulation_steps = 2 (ds.json); the error needs gradient_accumulation_steps >= 3",
        ),
        (with_zero(3), "yes", 1, "gradient_accumulation_steps = 3 (ds.json)"),
        (
            with_zero(stage=1),
            "no",
            0,
            "zero_optimization.stage = 1 (ds.json); the error needs zero_optimization.stage = 2",
        ),
        (
            with_zero(stage=3),
            "no",
            0,
            "zero_optimization.stage = 3 (ds.json); the error needs zero_optimization.stage = 2",
        ),
        (with_zero(offload_optimizer=None), "no", 0, "DeepSpeed takes none"),
        (with_zero(offload_optimizer={"device": "nvme"}), "yes", 1, "NVMe offload does not exist in stages 1 and 2"),
        (with_zero("auto"), "unknown", 3, '"auto"'),
        (with_zero(2, stage="auto"), "no", 0, "gradient_accumulation_steps = 2"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "no",
            0,
            "zero_optimization.stage is not set (ds.json): DeepSpeed takes 0",
        ),
    ],
)
def test_a_config_decides_whether_the_error_is_reached(trainfix, write, content, reachable, code, because):
    answer = trainfix("doctor", "--only", "TF-0001", "--config", write(content), "--format", "json")
    finding = answer.finding()
    assert (finding["reachable"], answer.code) == (reachable, code)
    assert any(because in reason for reason in finding["because"])


def test_several_backwards_per_step_show_in_no_config(trainfix, write):
    answer = trainfix("doctor", "--only", "TF-0003", "--config", write(with_zero(1)), "--format", "json")
    finding = answer.finding("TF-0003")
    assert (finding["reachable"], answer.code) == ("unknown", 3)
    assert any("no config file shows this" in reason for reason in finding["because"])


def test_one_reaching_config_among_several_is_enough(trainfix, write):
    healthy, reaching = write(with_zero(2), "a.json"), write(with_zero(4), "b.json")
    answer = trainfix("doctor", "--config", healthy, "--config", reaching, "--only", "TF-0001", "--format", "json")
    finding = answer.finding()
    assert (answer.code, finding["reachable"], answer.json["configs"]) == (1, "yes", ["a.json", "b.json"])
    assert all("(b.json)" in reason for reason in finding["because"])


def test_no_config_is_undecided_and_asked_for(trainfix):
    answer = trainfix("doctor")
    assert answer.code == 3
    assert "trainfix doctor --config FILE" in answer.out
    assert answer.out.endswith("exit 3 (could not decide)\n")
    assert trainfix("doctor", "--strict").code == 1
    assert trainfix("doctor", "--assume-import", "--strict").code == 0


def test_zenflow_reaches_the_error_and_is_not_repaired(trainfix, write):
    config = write(with_zero(zenflow={"update_interval": 4, "topk_ratio": 0.1}))
    answer = trainfix("doctor", "--config", config, "--assume-import", "--format", "json")
    finding = answer.finding()
    assert (answer.code, finding["reachable"], finding["repair"], finding["repaired"]) == (1, "yes", "refused", False)
    assert any("ZenFlow takes it in place of gradient_accumulation_steps" in reason for reason in finding["because"])
    assert any("UnfixedBugError" in note for note in finding["notes"])


def test_zenflow_with_the_error_out_of_reach_is_fine(trainfix, write):
    config = write(with_zero(zenflow={"update_interval": 2}))
    assert trainfix("doctor", "--config", config, "--only", "TF-0001").code == 0


# A catalogue of many: what needs attention in full, the rest in as few lines as possible.

SOMEWHEN = [{"key": "zero_optimization.stage", "equals": 2}, {"when": "something that no file shows"}]


def test_what_is_grave_or_certain_is_told_in_full_and_the_rest_in_a_line_each(trainfix, write, catalogue):
    catalogue("TF-0020", triggers=SOMEWHEN, summary="An error with a long name: " + "and so on " * 12)
    catalogue("TF-0021", triggers=SOMEWHEN, severity="metric", evidence_level="proved")
    catalogue("TF-0022", ways_out={"upgrade": None, "config": "do something else"})
    catalogue("TF-0023", triggers=[{"key": "zero_optimization.stage", "equals": 3}])
    catalogue("TF-0024", triggers=SOMEWHEN, evidence_level="proved")
    for number in (4, 5, 6, 8):
        catalogue(f"TF-000{number}", evidence={}, introduced="0.19.0")
    answer = trainfix("doctor", "--config", write())
    assert answer.code == 1
    heads = [line[:12] for line in answer.out.splitlines() if line.startswith("[")]
    assert heads == ["[X]  TF-0001", "[!]  TF-0022", "[!]  TF-0024", "[!]  TF-0020", "[!]  TF-0021"]
    lines = answer.out.splitlines()
    begin = lines.index("perhaps reached too (in full with --only ID):")
    assert lines[begin + 1] == "[!]  TF-0024  gradient: An error that we have only read of"
    assert lines[begin + 2].startswith("[!]  TF-0020  read: An error with a long name: and so on")
    assert lines[begin + 2].endswith(" ...")
    assert lines[begin + 3] == "[!]  TF-0021  metric: An error that we have only read of"
    text = " ".join(answer.out.split())
    assert "evidence: read in the source; no experiment of ours shows it repair: none yet" in text
    assert "upgrade: no release of deepspeed repairs it yet config: do something else" in text
    assert lines[-3:] == [
        "not reached by ds.json: TF-0003, TF-0023",
        "not in deepspeed 0.18.9: TF-0004 to TF-0006, TF-0008",
        "1 to repair, 4 to look at, 6 fine: exit 1 (something reachable is not repaired)",
    ]


def test_without_a_config_only_what_is_grave_and_repaired_is_told_in_full(trainfix, write, catalogue):
    for number in range(10, 35):
        catalogue(f"TF-00{number}", triggers=SOMEWHEN, evidence_level="proved" if number % 2 else "read")
    answer = trainfix("doctor")
    assert answer.code == 3
    assert answer.out.count("trainfix doctor --config FILE") == 1
    in_full = answer.out.split("perhaps reached too")[0]
    assert [line[5:12] for line in in_full.splitlines() if line.startswith("[")] == ["TF-0001", "TF-0003"]
    assert answer.out.count("repair:") == 2
    assert len(answer.out.splitlines()) < 65
    assert trainfix("doctor", "--config", write()).out.count("repair:") == 1


def test_a_loss_of_precision_is_repaired_by_name_only_and_no_import_says_so(trainfix, write, catalogue):
    catalogue.keep("TF-0009")
    config = write({**OFFLOADED, "bf16": {"enabled": True}})
    answer = trainfix("doctor", "--config", config, "--only", "TF-0009", "--assume-import")
    assert answer.code == 0
    assert 'repair: call `trainfix.apply("TF-0009")` in the training script' in " ".join(answer.out.split())
    found = trainfix("doctor", "--config", config, "--assume-import", "--format", "json").finding("TF-0009")
    assert (found["reachable"], found["repair"], found["repaired"]) == ("yes", "available", False)
    assert trainfix("doctor", "--config", write(), "--only", "TF-0009", "--strict").code == 0  # fp32


def test_what_only_the_program_can_reach_counts_where_it_can_be_repaired(trainfix, write, catalogue):
    """Else every run of such a config would be called doubtful for ever; --strict asks for just that."""
    one_step = {**OFFLOADED, "gradient_accumulation_steps": 1}
    assert trainfix("doctor", "--config", write(one_step), "--only", "TF-0003").code == 3
    catalogue("TF-0024", triggers=SOMEWHEN, evidence_level="proved")
    assert trainfix("doctor", "--config", write(), "--only", "TF-0024").code == 0
    assert trainfix("doctor", "--config", write(), "--only", "TF-0024", "--strict").code == 1
    assert trainfix("doctor", "--only", "TF-0024").code == 3


def test_one_that_is_asked_for_is_told_in_full_with_why_it_is_not_reached(trainfix, write, catalogue):
    catalogue("TF-0020", triggers=SOMEWHEN)
    config = write(with_zero(stage=1))
    text = trainfix("doctor", "--config", config, "--only", "TF-0020", "--only", "TF-0001").out
    assert text.count("not reached: zero_optimization.stage = 1 (ds.json)") == 2
    assert text.endswith("all good: 2 checked, nothing reachable is unrepaired (exit 0)\n")


def test_what_does_not_count_is_not_called_good(trainfix, write, catalogue):
    catalogue("TF-0020")
    answer = trainfix("doctor", "--config", write(), "--assume-import")
    assert answer.code == 0
    assert "repaired by assumed import: TF-0001\n" in answer.out
    assert answer.out.endswith("1 to look at, 2 fine: exit 0 (what is to look at counts only with --strict)\n")
    assert trainfix("doctor", "--config", "ds.json", "--assume-import", "--strict").code == 1


def test_an_error_outside_python_code_is_judged_by_its_releases(trainfix, write, catalogue):
    catalogue("TF-0020", evidence={})
    argv = ("doctor", "--config", write(), "--format", "json")
    found = {
        version: trainfix(*argv, installed=version).finding("TF-0020") for version in ("0.15.1", "0.18.9", "0.19.0")
    }
    assert [one["verdict"] for one in found.values()] == ["not-affected", "affected", "fixed-upstream"]
    assert {one["by"] for one in found.values()} == {"version"}


# Changes of default that alter training silently. They never decide the exit code.


def test_an_implicit_default_that_changed_is_named(trainfix, write):
    answer = trainfix("doctor", "--config", write(), installed="0.19.8")
    assert answer.code == 0
    said = "  - gradient_clipping is not set (ds.json): DeepSpeed 0.19.8 clips at 1.0; before 0.19.3 it did not clip\n"
    assert said in answer.out
    json = trainfix("doctor", "--config", "ds.json", "--format", "json", installed="0.19.8").json
    assert json["exit"] == 0
    found = {one["key"]: one for one in json["hazards"]}
    assert found.keys() == {"gradient_clipping", "zero_optimization.offload_optimizer.pin_memory"}
    clipping = found["gradient_clipping"]
    assert (clipping["value"], clipping["before"], clipping["since"], clipping["config"]) == (1, 0, "0.19.3", "ds.json")
    assert (clipping["package"], clipping["only_if"], clipping["affects"]) == ("deepspeed", [], "numbers")
    assert clipping["summary"] == said[4:-1]
    assert clipping["url"].endswith("/pull/8068")
    assert found["zero_optimization.offload_optimizer.pin_memory"]["affects"] == "memory"


@pytest.mark.parametrize(
    ("changes", "version", "clips"),
    [
        ({}, "0.19.3", True),
        ({}, "0.19.2", False),
        ({"gradient_clipping": 0.0}, "0.19.8", False),
        ({"gradient_clipping": "auto"}, "0.19.8", False),
    ],
)
def test_a_default_is_named_from_its_release_on_and_only_where_it_rules(trainfix, write, changes, version, clips):
    argv = ("doctor", "--config", write(OFFLOADED | changes), "--format", "json")
    keys = [one["key"] for one in trainfix(*argv, installed=version).json["hazards"]]
    assert ("gradient_clipping" in keys) is clips


def test_a_default_that_depends_on_what_the_file_leaves_open_says_so(trainfix, write):
    config = write(OFFLOADED | {"bf16": {"enabled": "auto"}, "gradient_clipping": 1.0})
    answer = trainfix("doctor", "--config", config, installed="0.19.8")
    text = " ".join(answer.out.split())
    assert "and, depending on what the configs leave open: bf16.check_grad_overflow, data_types.buffer_dtype" in text
    json = trainfix("doctor", "--config", config, "--format", "json", installed="0.19.8").json
    found = {one["key"]: one["only_if"] for one in json["hazards"]}
    assert found["bf16.check_grad_overflow"] == ["bf16.enabled = true"]


def test_without_a_config_no_default_is_said_to_be_in_force(trainfix):
    assert trainfix("doctor", "--format", "json", installed="0.19.8").json["hazards"] == []
    assert "defaults in force" not in trainfix("doctor", installed="0.19.8").out


def test_an_upgrade_names_what_else_it_changes_for_these_configs(trainfix, write):
    def hazards(content: dict[str, object], version: str = "0.18.9") -> list[str]:
        argv = ("doctor", "--config", write(content), "--format", "json")
        return [hazard.split()[0] for hazard in trainfix(*argv, installed=version).finding()["hazards"]]

    pinned, norm = "zero_optimization.offload_optimizer.pin_memory", "from"  # from 0.19.8 a step ... is skipped
    assert hazards(OFFLOADED) == ["gradient_clipping", pinned, norm]
    assert hazards(OFFLOADED | {"gradient_clipping": 1.0}) == [pinned, norm]
    bf16 = OFFLOADED | {"bf16": {"enabled": True}}
    assert hazards(bf16) == ["data_types.buffer_dtype", "gradient_clipping", "bf16.check_grad_overflow", pinned, norm]
    warm = OFFLOADED | {"scheduler": {"type": "WarmupLR", "params": {}}}
    assert hazards(warm, "0.16.0")[:2] == ["scheduler.params.warmup_max_lr", "gradient_clipping"]
    assert hazards(with_zero(2)) == []
    text = trainfix("doctor", "--config", write()).out
    assert text.count("an upgrade of deepspeed also changes silently:\n  - gradient_clipping defaults to 1.0") == 1


# What the user leaves out.


def test_an_ignored_finding_never_counts_and_keeps_its_reason(trainfix, write):
    argv = ("doctor", "--config", write(), "--ignore", "TF-0001", "--reason", "a toy run")
    answer = trainfix(*argv)
    assert answer.code == 0
    assert "[-]  ignored (a toy run): TF-0001\n" in answer.out
    json = trainfix(*argv, "--strict", "--format", "json")
    assert (json.code, json.finding()["ignored"], json.finding()["reachable"]) == (0, "a toy run", "yes")


@pytest.mark.parametrize(
    "argv",
    [
        ("--ignore", "TF-0001"),
        ("--ignore", "TF-0001", "--reason", "  "),
        ("--ignore", "TF-0001", "--ignore", "TF-0003", "--reason", "one for both"),
    ],
)
def test_every_ignore_needs_its_own_reason(trainfix, argv):
    answer = trainfix("doctor", *argv)
    assert (answer.code, answer.out) == (2, "")
    assert "--ignore TF-0001 needs its own --reason" in answer.err


@pytest.mark.parametrize("argv", [("--reason", "x"), ("--ignore", "TF-0001", "--reason", "a", "--reason", "b")])
def test_a_reason_without_its_ignore_is_a_mistake(trainfix, argv):
    answer = trainfix("doctor", *argv)
    assert answer.code == 2
    assert "right after the --ignore" in answer.err


# Which findings count.


@pytest.mark.parametrize(
    ("changes", "code", "strict"),
    [
        ({}, 1, 1),
        ({"reachable": "unknown"}, 3, 1),
        ({"reachable": "no"}, 0, 0),
        ({"repaired_by": "assumed import"}, 0, 0),
        ({"ignored": "a toy run"}, 0, 0),
        ({"verdict": "unknown"}, 3, 3),
        ({"verdict": "unverified", "reachable": "unknown"}, 3, 3),
        ({"verdict": "unverified", "reachable": "no"}, 0, 0),
        ({"verdict": "fixed-by-source-patch"}, 0, 0),
    ],
)
@pytest.mark.parametrize(
    ("grade", "counts"),
    [
        ({"severity": "gradient"}, True),
        ({"severity": "scale"}, True),
        ({"severity": "precision"}, False),
        ({"severity": "default"}, False),
        ({"evidence_level": "read"}, False),
        ({"evidence_level": "reported"}, False),
    ],
)
def test_lower_severity_and_evidence_count_only_when_strict(grade, counts, changes, code, strict):
    advisory = replace(load("TF-0001"), **grade)
    found = Finding(advisory, "0.18.9", **{"verdict": "affected", "reachable": "yes", **changes})
    assert found.exit_code(strict=False) == (code if counts else 0)
    assert found.exit_code(strict=True) == strict


def test_one_comes_before_three(trainfix, write):
    """TF-0001 is certain here and TF-0003 is not: several configs of one project."""
    certain, open_ = write(with_zero(4), "a.json"), write(with_zero(1), "b.json")
    assert trainfix("doctor", "--config", open_).code == 3
    assert trainfix("doctor", "--config", certain, "--config", open_).code == 1


# What stands in the way of an upgrade.


def test_a_requirement_that_forbids_the_repaired_release_is_named(trainfix, write, site):
    site("openrlhf", "0.10.3", "Requires-Dist: deepspeed==0.18.9", "Requires-Dist: torch")
    answer = trainfix("doctor", "--config", write(), "--format", "json")
    blocker = {"by": "openrlhf 0.10.3", "requires": "deepspeed==0.18.9", "strength": "requires", "off": None}
    assert answer.finding()["blocked_by"] == [blocker]
    assert "openrlhf 0.10.3 requires deepspeed==0.18.9" in trainfix("doctor", "--config", "ds.json").out


@pytest.mark.parametrize(
    ("lines", "strength"),
    [
        (["Provides-Extra: deepspeed", 'Requires-Dist: deepspeed<0.19,>=0.18.6; extra == "deepspeed"'], "extra"),
        (
            ["Provides-Extra: ds", 'Requires-Dist: DeepSpeed<0.19; extra == "ds"', "Requires-Dist: deepspeed<=0.18.9"],
            "requires",
        ),
        (['Requires-Dist: deepspeed<0.19; sys_platform == "win32"'], None),
        (["Requires-Dist: deepspeed>=0.14.4"], None),
        (["Requires-Dist: deepspeed<0.20,>=0.18.6"], None),
        (["Requires-Dist: deepspeed==0.19.1"], None),
        (["Requires-Dist: deepspeed-extras==0.18.9"], None),
        (["Requires-Dist: deepspeed ~~ broken"], None),
    ],
)
def test_how_strongly_a_requirement_forbids_it(trainfix, site, lines, strength):
    site("framework", "1.0", *lines)
    found = trainfix("doctor", "--format", "json").finding()["blocked_by"]
    assert [one["strength"] for one in found] == ([] if strength is None else [strength])


# Installations that are not as they should be: a clear word, the documented exit code, never a traceback.


@pytest.fixture
def altered(tmp_path):
    """A copy of DeepSpeed 0.18.9: its metadata and the one source file that decides."""

    def copied(version: str = "0.18.9", folder: str = "altered") -> Path:
        source, target = release("0.18.9"), tmp_path / folder
        shutil.copytree(source / "deepspeed-0.18.9.dist-info", target / f"deepspeed-{version}.dist-info")
        shutil.copytree(source / "deepspeed/runtime", target / "deepspeed/runtime")
        metadata = target / f"deepspeed-{version}.dist-info/METADATA"
        metadata.write_text(metadata.read_text().replace("\nVersion: 0.18.9\n", f"\nVersion: {version}\n"))
        return target

    return copied


STAGE_1_AND_2 = "deepspeed/runtime/zero/stage_1_and_2.py"


def test_two_installations_are_both_named_and_the_first_is_judged(trainfix, write, monkeypatch):
    monkeypatch.syspath_prepend(str(release("0.19.8")))
    answer = trainfix("doctor", "--config", write(), installed="0.18.9")
    assert answer.code == 1
    text = " ".join(answer.out.split())
    assert "deepspeed is installed 2 times" in text
    assert f"0.18.9 in {release('0.18.9')}; 0.19.8 in {release('0.19.8')}" in text
    assert "the first is imported, and judged" in text


def test_without_source_files_it_cannot_decide(trainfix, write, altered):
    folder = altered()
    (folder / STAGE_1_AND_2).rename(folder / (STAGE_1_AND_2 + "c"))
    answer = trainfix("doctor", "--config", write(), "--only", "TF-0001", installed=folder)
    assert answer.code == 3
    text = " ".join(answer.out.split())
    assert f"deepspeed 0.18.9 in {folder} has no source file for deepspeed.runtime.zero.stage_1_and_2" in text
    assert "pip install --force-reinstall --no-deps deepspeed==0.18.9" in text
    json = trainfix("doctor", "--config", "ds.json", "--format", "json", installed=folder)
    assert (json.finding()["verdict"], json.finding()["repair"]) == ("unknown", "refused")


def test_an_unknown_body_in_a_known_release_is_refused(trainfix, write, altered):
    folder = altered()
    file = folder / STAGE_1_AND_2
    file.write_text(
        file.read_text().replace(
            "if self.micro_step_id > 0:\n            accumulate", "if True:\n            accumulate"
        )
    )
    answer = trainfix("doctor", "--config", write(), "--only", "TF-0001", "--assume-import", installed=folder)
    assert answer.code == 3
    assert "its code is not one that we know" in answer.out
    assert "refused here" in answer.out


def test_a_release_newer_than_the_catalogue_is_said_to_be_so(trainfix, write, altered):
    folder = altered("0.99.0")
    answer = trainfix("doctor", "--config", write(), "--only", "TF-0001", installed=folder)
    last_run = newest_run()
    assert f"deepspeed 0.99.0 is newer than {last_run}, the last release in this catalogue" in " ".join(
        answer.out.split()
    )
    assert answer.code == 1  # its code is a body that we know to be wrong, whatever the version says
    file = folder / STAGE_1_AND_2
    file.write_text(
        file.read_text().replace(
            "if self.micro_step_id > 0:\n            accumulate", "if True:\n            accumulate"
        )
    )
    answer = trainfix("doctor", "--config", "ds.json", "--only", "TF-0001", "--format", "json", installed=folder)
    assert (answer.code, answer.finding()["verdict"]) == (3, "unverified")


def newest_run() -> str:
    return load("TF-0001").last_run


def test_metadata_without_a_version_is_a_broken_installation(trainfix, altered):
    folder = altered()
    (folder / "deepspeed-0.18.9.dist-info/METADATA").write_text("Name: deepspeed\n")
    answer = trainfix("doctor", installed=folder)
    assert (answer.code, answer.out) == (3, "")
    assert "has no version in its metadata" in answer.err
    assert "pip install --force-reinstall" in answer.err


def test_source_that_is_not_text_is_a_broken_installation(trainfix, altered):
    folder = altered()
    (folder / STAGE_1_AND_2).write_bytes(b"\xff\xfe")
    answer = trainfix("doctor", installed=folder)
    assert (answer.code, answer.out) == (3, "")
    assert STAGE_1_AND_2 in answer.err
    assert "reinstall deepspeed 0.18.9" in answer.err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.json", None, "missing.json: no such file"),
        ("broken.json", "{", "broken.json, line 1 column 2: not valid JSON"),
        ("list.json", "[]", "list.json holds a list"),
        (".", None, ". is a directory"),
    ],
)
def test_a_bad_config_is_a_usage_error(trainfix, write, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    answer = trainfix("doctor", "--config", write(), "--config", name)
    assert (answer.code, answer.out) == (2, "")
    assert f"--config: {words}" in answer.err


# Where the report goes.


def test_the_report_is_written_whole_to_a_file(trainfix, write, tmp_path):
    plain = trainfix("doctor", "--config", write(), "--format", "json")
    (tmp_path / "report.json").write_text("an older report")
    answer = trainfix("doctor", "--config", "ds.json", "--format", "json", "-o", "report.json")
    assert (answer.code, answer.out) == (1, "")
    assert (tmp_path / "report.json").read_text() == plain.out
    assert "report written to report.json" in answer.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ds.json", "report.json"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "is a directory"),
        ("absent/report.json", "is not a directory"),
        ("/proc/self/report.json", "name a file in a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_usage_error(trainfix, write, output, words):
    answer = trainfix("doctor", "--config", write(), "-o", output)
    assert (answer.code, answer.out) == (2, "")
    assert f"-o {output}" in answer.err
    assert words in answer.err


def test_a_device_is_written_to_and_not_replaced(trainfix, write):
    assert trainfix("doctor", "--config", write(), "-o", "/dev/null").code == 1
    assert Path("/dev/null").is_char_device()
