"""What people have: trainers' configs, scripts, other environments, lock files, checkpoints -> doctor's verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import OFFLOADED
from tests.support.releases import release

AUTO = {
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
YAML = """\
model_name_or_path: a/model
stage: sft
do_train: true
finetuning_type: lora
dataset: identity
template: llama3
output_dir: saves
gradient_accumulation_steps: 8
deepspeed: ds.json
"""
SCRIPT = """\
#!/bin/bash
read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft --train_batch_size 64 --micro_train_batch_size 2 --zero_stage 2 --adam_offload --bf16
EOF
deepspeed --num_gpus 4 --module $training_commands
"""


@pytest.fixture
def file(tmp_path: Path):
    """Writes a text file below the current folder and gives its name."""

    def put(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return name

    return put


def test_auto_is_filled_in_from_the_trainers_own_file_and_the_reason_names_both(trainfix, write, file):
    write(AUTO)
    found = trainfix("doctor", "--config", file("train.yaml", YAML), "--format", "json").finding()
    assert (found["verdict"], found["reachable"]) == ("affected", "yes")
    assert "zero_optimization.stage = 2 (ds.json)" in found["because"]
    assert "gradient_accumulation_steps = 8 (train.yaml)" in found["because"]
    places = {(place["file"], place["line"]) for place in found["places"]}
    assert {("train.yaml", 8), ("ds.json", None)} <= places or ("train.yaml", 8) in places


def test_without_the_trainers_file_auto_is_unknown_and_undecided(trainfix, write):
    answer = trainfix("doctor", "--config", write(AUTO), "--only", "TF-0001", "--format", "json")
    assert (answer.finding()["reachable"], answer.code) == ("unknown", 3)


def test_a_trainer_without_deepspeed_reaches_no_error_of_deepspeeds(trainfix, file):
    plain = YAML.replace("deepspeed: ds.json\n", "")
    answer = trainfix("doctor", "--config", file("train.yaml", plain), "--format", "json")
    of_deepspeed = [
        one for one in answer.json["findings"] if one["package"] == "deepspeed" and one["reachable"] != "no"
    ]
    assert [one["id"] for one in of_deepspeed if one["verdict"] == "affected"] == []
    assert answer.json["hazards"] == []


def test_a_script_is_read_and_its_ranks_decide_the_window(trainfix, file):
    answer = trainfix("doctor", "--config", file("train.sh", SCRIPT), "--format", "json")
    because = " ".join(answer.finding()["because"])
    assert answer.finding()["reachable"] == "yes"
    assert "gradient_accumulation_steps = 8" in because and "train.sh" in because


def test_a_kind_that_a_file_is_not_is_an_error_that_names_the_kinds(trainfix, file):
    answer = trainfix("doctor", "--config", file("train.yaml", YAML), "--kind", "lamafactory")
    assert answer.code == 2
    assert "did you mean llamafactory?" in answer.err


def test_a_file_that_nobody_knows_is_rejected_with_the_next_step(trainfix, file):
    answer = trainfix("doctor", "--config", file("notes.yaml", "a: 1\n"))
    assert answer.code == 2
    assert "notes.yaml looks like no config that trainfix knows" in answer.err and "--kind" in answer.err


def test_another_environment_is_judged_by_its_code(trainfix, write):
    answer = trainfix(
        "doctor", "--site", str(release("0.18.9")), "--config", write(), "--format", "json", installed=None
    )
    assert answer.json["packages"]["deepspeed"] == "0.18.9"
    assert (answer.finding()["by"], answer.finding()["verdict"], answer.code) == ("shape", "affected", 1)


def test_an_environment_that_is_none_says_what_was_looked_for(trainfix):
    answer = trainfix("doctor", "--site", "venv")
    assert answer.code == 2
    assert "--site: venv: no such folder or interpreter" in answer.err


def test_a_lock_file_is_judged_by_version_and_the_report_says_so(trainfix, write, file):
    lock = file("requirements.txt", "deepspeed==0.18.9\nllamafactory==0.9.4\n")
    argv = ("doctor", "--lock", lock, "--config", write())
    answer = trainfix(*argv, "--format", "json", installed=None)
    found = answer.finding()
    assert (found["by"], found["verdict"], found["shape"], found["repair"]) == (
        "version",
        "affected",
        None,
        "available",
    )
    assert [one["strength"] for one in found["blocked_by"]] == ["runtime-check"]
    assert "by version only" in trainfix(*argv, installed=None).out


@pytest.mark.parametrize(
    ("pin", "verdict"),
    [
        ("0.18.9", "affected"),
        ("0.18.9+cu124", "affected"),
        ("0.15.1", "not-affected"),
        ("0.19.0", "fixed-upstream"),
        ("0.99.0", "unverified"),
        ("0.18.9.post1", "unknown"),
        ("main", "unknown"),
    ],
)
def test_a_version_alone_gives_a_verdict_or_none(trainfix, write, file, pin, verdict):
    lock = file("requirements.txt", f"deepspeed==={pin}\n" if pin == "main" else f"deepspeed=={pin}\n")
    answer = trainfix("doctor", "--lock", lock, "--config", write(), "--format", "json", installed=None)
    assert answer.finding()["verdict"] == verdict


def test_a_range_in_a_lock_file_tells_no_version_and_stays_undecided(trainfix, write, file):
    lock = file("requirements.txt", "deepspeed>=0.14\n")
    argv = ("doctor", "--lock", lock, "--config", write(), "--only", "TF-0001")
    answer = trainfix(*argv, "--format", "json", installed=None)
    assert (answer.finding()["verdict"], answer.code) == ("unknown", 3)
    assert "deepspeed>=0.14 (requirements.txt, line 1)" in " ".join(answer.finding()["notes"])
    assert "deepspeed>=0.14" in trainfix(*argv, installed=None).out


STAMP = {
    "schema": 1,
    "trainfix": "0.1.0",
    "date": "2026-11-28T12:00:00Z",
    "packages": {"deepspeed": "0.18.9", "torch": "2.13.0"},
    "applied": [
        {"id": "TF-0001", "fix": "deepspeed.offload_accumulation", "package": "deepspeed", "shape": "8f1759c219c1"}
    ],
    "states": {},
    "partly": [],
}


def test_a_checkpoint_says_that_its_run_was_repaired(trainfix, write, file, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    file("checkpoint-5/trainfix.json", json.dumps(STAMP))
    argv = ("doctor", "--checkpoint", "checkpoint-5", "--config", write(OFFLOADED))
    answer = trainfix(*argv, "--format", "json", installed=None)
    assert (answer.finding()["repaired"], answer.finding()["verdict"]) == (True, "affected")
    assert answer.finding()["repaired_by"] == "the run itself (checkpoint-5/trainfix.json)"
    assert answer.finding("TF-0004")["repaired"] is False
    assert "Saved on 2026-11-28 with trainfix 0.1.0, repaired: TF-0001" in trainfix(*argv, installed=None).out.replace(
        "\n             ", " "
    )


def test_a_checkpoint_without_a_stamp_decides_nothing_and_asks_for_the_versions(trainfix, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    answer = trainfix("doctor", "--checkpoint", "checkpoint-5")
    assert answer.code == 3
    assert "There is no trainfix.json in checkpoint-5" in answer.err and "--lock FILE" in answer.err


def test_a_checkpoint_that_is_none_is_a_usage_error(trainfix):
    answer = trainfix("doctor", "--checkpoint", "checkpoint-5")
    assert (answer.code, "checkpoint-5 does not exist" in answer.err) == (2, True)


def test_proving_is_for_the_packages_that_are_here(trainfix, file):
    answer = trainfix("doctor", "--prove", "--lock", file("requirements.txt", "deepspeed==0.18.9\n"))
    assert (answer.code, "leave out --site, --lock and --checkpoint" in answer.err) == (2, True)


@pytest.mark.slow
def test_doctor_proves_what_it_finds_and_says_it_in_the_finding(trainfix, write, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(release("0.18.9")))
    argv = ("doctor", "--prove", "--only", "TF-0001", "--config", write())
    answer = trainfix(*argv, "--format", "json")
    proof = answer.finding()["proof"]
    assert (proof["reproduced"], proof["repaired"]) == (True, True)
    assert [round(one) for one in proof["before"]["coefficients"]] == [1, 0, 0, 0, 0, 0, 0, 1]
    assert "TF-0001 shown, gone with the repair" in answer.err


def test_an_enabled_environment_is_shown_and_counts_as_repaired(trainfix, write, tmp_path):
    from trainfix.activation.found import START_FILE
    from trainfix.cli.enable import LINE

    source = Path(__file__).resolve().parents[2] / "src"
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "trainfix.pth").write_text(f"{source}\n{release('0.18.9')}\n")
    argv = ("doctor", "--site", "site-packages", "--config", write())
    assert trainfix(*argv, installed=None).code == 1
    (site / START_FILE).write_text(LINE)
    answer = trainfix(*argv, "--format", "json", installed=None)
    assert (answer.finding()["repaired_by"], answer.json["active"]) == ("trainfix enable", True)
    assert START_FILE in trainfix(*argv, installed=None).out.replace("\n", "")
