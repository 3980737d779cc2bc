"""[tool.trainfix] in pyproject.toml: what a project wants of doctor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import OFFLOADED


@pytest.fixture
def project(tmp_path: Path):
    def write(text: str) -> None:
        (tmp_path / "pyproject.toml").write_text(text)

    return write


def test_the_projects_configs_are_read_where_none_is_given(trainfix, write, project):
    write()
    write({"zero_optimization": {"stage": 0}}, "plain.json")
    project('[tool.trainfix]\nconfig = ["ds.json"]\n')
    assert trainfix("doctor", "--format", "json").json["configs"] == ["ds.json"]
    assert trainfix("doctor", "--format", "json", "--config", "plain.json").json["configs"] == ["plain.json"]


def test_what_the_project_ignores_keeps_its_reason_and_a_flag_comes_first(trainfix, write, project):
    write()
    project('[tool.trainfix]\nconfig = ["ds.json"]\n[tool.trainfix.ignore]\nTF-0001 = "an old run"\n')
    assert trainfix("doctor", "--format", "json").finding()["ignored"] == "an old run"
    flag = ("--ignore", "TF-0001", "--reason", "we know")
    assert trainfix("doctor", "--format", "json", *flag).finding()["ignored"] == "we know"


def test_a_strict_project_counts_everything(trainfix, write, project):
    narrow = {**OFFLOADED, "bf16": {"enabled": True}}
    argv = ("doctor", "--config", write(narrow), "--only", "TF-0009")  # a loss of precision
    assert trainfix(*argv).code == 0
    project("[tool.trainfix]\nstrict = true\n")
    assert trainfix(*argv).code == 1


@pytest.mark.parametrize("text", ["", "[tool.ruff]\nline-length = 120\n", "[project]\nname = 'x'\n", "[broken"])
def test_a_file_that_says_nothing_of_us_changes_nothing(trainfix, project, text):
    project(text)
    assert trainfix("doctor", installed="0.19.8").code in (0, 3)
    assert "pyproject" not in trainfix("doctor", installed="0.19.8").err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.trainfix]\nconfg = []\n", ["pyproject.toml, [tool.trainfix]", "did you mean config?"]),
        ('[tool.trainfix]\nconfig = "ds.json"\n', ["config = 'ds.json' is not a list of file names"]),
        ("[tool.trainfix]\nstrict = 1\n", ["strict = 1 is not true or false"]),
        ('[tool.trainfix.ignore]\nTF-0001 = ""\n', ["a table of ids and reasons"]),
        ('[tool.trainfix.ignore]\nTF-1 = "why"\n', ["[tool.trainfix.ignore]", "unknown advisory 'TF-1'"]),
        ("[tool]\ntrainfix = 1  # tool.trainfix\n", ["tool.trainfix is no table"]),
        ("[tool.trainfix\n", ["pyproject.toml: not valid TOML", "write it again"]),
    ],
)
def test_a_mistake_is_named_with_its_place(trainfix, project, text, words):
    project(text)
    answer = trainfix("doctor")
    assert answer.code == 2
    for word in words:
        assert word in answer.err
