"""`trainfix prove` on real releases, as users start it: progress on stderr, the report on stdout, the exit code."""

from __future__ import annotations

import json

import pytest

from trainfix.cli.proof_text import prove_text

from .test_commands import environment, release, shell

RIGHT = {"coefficients": [1.0, 1.0], "relative_error": 1e-8, "cosine": 1.0, "norm_ratio": 1.0}
WRONG = {"coefficients": [1.0, 0.0], "relative_error": 0.9, "cosine": 0.4, "norm_ratio": 0.5}


@pytest.mark.slow
def test_the_error_of_0_18_9_is_shown_and_gone_with_the_repair(tmp_path):
    report = tmp_path / "proof.json"
    argv = ("prove", "tf-0001", "--format", "json", "-o", str(report))
    answer = shell(*argv, env=environment(release("0.18.9")))
    assert (answer.returncode, answer.stdout) == (0, "")
    assert "trainfix: proof 1 of 1: TF-0001 ..." in answer.stderr
    content = json.loads(report.read_text())
    assert (content["schema"], content["exit"], content["packages"]) == (1, 0, {"deepspeed": "0.18.9"})
    (proof,) = content["proofs"]
    assert (proof["applicable"], proof["reproduced"], proof["repaired"], proof["reason"]) == (True, True, True, None)
    assert proof["before"]["coefficients"] == pytest.approx([1, 0, 0, 0, 0, 0, 0, 1], abs=1e-3)
    assert proof["after"]["coefficients"] == pytest.approx([1] * 8, abs=1e-3)


def test_a_repaired_release_has_nothing_to_prove(trainfix, catalogue, monkeypatch):
    catalogue("TF-0014")  # without a proof: not among those that run when none is named
    monkeypatch.setenv("PYTHONPATH", str(release("0.19.8")))
    answer = trainfix("prove", installed=None)
    assert answer.code == 0
    for advisory_id in ("TF-0001", "TF-0003"):
        assert f"{advisory_id} on deepspeed 0.19.8: does not apply" in answer.out
    assert "TF-0014" not in answer.out + answer.err
    assert answer.out.endswith("none of these errors applies here (exit 0)\n")


def test_an_unwritable_place_is_said_before_the_work(tmp_path):
    answer = shell("prove", "TF-0001", "-o", str(tmp_path / "absent/report"), env=environment(release("0.18.9")))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "absent is not a directory" in answer.stderr
    assert "proof 1" not in answer.stderr


def record(**changes: object) -> dict[str, object]:
    base = {"id": "TF-0001", "package": "deepspeed", "installed": "0.18.9", "applicable": True, "reproduced": True}
    return {**base, "repaired": True, "reason": None, "before": WRONG, "after": RIGHT, "seconds": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, ["shown, and gone with the repair", "############  1.000", "0.000", "(exit 0)"]),
        ({"repaired": False, "after": WRONG}, 1, ["shown, and NOT repaired", "still there with the repair (exit 1)"]),
        ({"reproduced": False, "after": None}, 3, ["the error did not show", "could not be shown here (exit 3)"]),
        (
            {"reproduced": None, "before": None, "after": None, "reason": "no torch"},
            3,
            ["could not be run", "no torch"],
        ),
        ({"applicable": None, "reproduced": None, "before": None, "after": None}, 3, ["could not be run"]),
        ({"applicable": False, "repaired": None, "after": None}, 1, ["not listed as affected, but the error shows"]),
        (
            {"applicable": False, "reproduced": None, "before": None, "after": None},
            0,
            ["does not apply", "none of these"],
        ),
    ],
)
def test_the_text_tells_the_outcomes_apart(changes, code, words):
    text = prove_text([record(**changes)], code, colour=False)
    for word in words:
        assert word in text
    assert "\033" not in text


def test_a_dropped_micro_batch_is_red_on_a_terminal():
    text = prove_text([record()], 0, colour=True)
    assert "\033[31m              0.000" in text
    assert "\033[32m############  1.000" in text
