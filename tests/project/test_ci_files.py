"""action.yml, .pre-commit-hooks.yaml and docs/ci.md: they parse, they fit together, and what they start works."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from tests.support.releases import release
from trainfix import __version__, cli
from trainfix.cli import base, doctor, pre_commit
from trainfix.cli.prove import SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = CHECKOUT / "demo" / "ds_zero2_offload.json"
PAGE = (CHECKOUT / "docs" / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
ACTION: dict[str, Any] = yaml.safe_load((CHECKOUT / "action.yml").read_text(encoding="utf-8"))
(HOOK,) = yaml.safe_load((CHECKOUT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def documents() -> list[Any]:
    """The page's YAML examples."""
    return [yaml.safe_load(text) for text in blocks("yaml")]


def parsed(words: list[str]) -> Any:
    """What trainfix's own parser makes of a command line. Raises UsageError."""
    return cli._parsers()[0].parse_args(words)


# The page.


def shown_commands() -> list[str]:
    lines = [line.removeprefix("$ ") for text in blocks("console") for line in text.splitlines()]
    return lines + [line for one in documents() for line in one.get("trainfix", {}).get("script", ())]


@pytest.mark.parametrize("line", [line for line in shown_commands() if line.startswith("trainfix ")])
def test_a_command_of_the_page_is_one_that_trainfix_takes(line: str) -> None:
    parsed(shlex.split(line)[1:])


def test_the_page_shows_each_way_in() -> None:
    programs = {line.split()[0] for line in shown_commands()}
    assert programs == {"trainfix", "pip", "pytest"}
    assert sum(line.startswith("trainfix ") for line in shown_commands()) >= 5
    assert {name for name, _ in BLOCKS} == {"console", "toml", "yaml", "python", "ini"}


def test_the_exit_codes_of_the_page_are_those_of_the_program() -> None:
    rows = dict(re.findall(r"^\| (\d) \| (.*?) \|", PAGE, re.M))
    assert set(rows) == {str(code) for code in (base.OK, base.UNREPAIRED, base.USAGE, base.UNDECIDED)}
    assert rows["0"].startswith("nothing reachable is unrepaired")
    assert rows["1"].startswith("something reachable is not repaired")
    assert rows["2"].startswith("usage")
    assert rows["3"].startswith("could not decide")
    assert f"within {SECONDS:g} s" in PAGE


def test_the_table_for_pyproject_is_one_that_doctor_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = blocks("toml")
    assert tomllib.loads(text)["tool"]["trainfix"]
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ds.json").write_text(CONFIG.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(release("0.18.9")))
    assert cli.main(["doctor", "--format", "json"]) == base.UNREPAIRED
    report = json.loads(capsys.readouterr().out)
    assert report["configs"] == ["configs/ds.json"]
    ignored = {finding["id"]: finding["ignored"] for finding in report["findings"] if finding["ignored"]}
    assert ignored == {"TF-0009": "sums in bf16 are what we want"}


def test_every_version_of_trainfix_in_the_page_is_this_one() -> None:
    assert set(re.findall(r"(?:trainfix@|rev: )v([\d.]+)", PAGE)) == {__version__}


def test_every_file_that_the_page_links_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE)
    assert links
    assert [link for link in links if not (CHECKOUT / "docs" / link).exists()] == []


def test_the_pytest_examples_are_what_the_plugin_takes() -> None:
    import trainfix_pytest

    source = Path(trainfix_pytest.__file__).read_text()
    (example,) = blocks("python")
    compile(example, "example", "exec")
    assert (
        set(re.findall(r"(\w+)=", example))
        == {"config", "allow"}
        == set(re.findall(r"(\w+)=", trainfix_pytest._MARKER.partition(":")[0]))
    )
    ini = configparser.ConfigParser()
    ini.read_string(*blocks("ini"))
    for name in ini["pytest"]:
        assert f'addini("{name}"' in source
    option = next(line for line in shown_commands() if line.startswith("pytest ")).split()[1]
    assert f'addoption("{option}"' in source


# The action.


def test_the_action_is_composite_and_says_what_each_input_and_output_is() -> None:
    assert set(ACTION["inputs"]) == {"config", "lock", "args", "format"}
    assert set(ACTION["outputs"]) == {"report", "sarif", "exit-code"}
    assert all(one["description"] for one in (*ACTION["inputs"].values(), *ACTION["outputs"].values()))
    assert ACTION["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in ACTION["runs"]["steps"])
    assert ACTION["inputs"]["format"]["default"] in doctor.FORMATS


def test_no_text_of_a_workflow_becomes_part_of_a_script() -> None:
    assert not [step for step in ACTION["runs"]["steps"] if "${{" in step["run"]]


def test_the_page_lists_the_actions_inputs_and_outputs_and_uses_no_other() -> None:
    listed = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M))
    assert listed == {*ACTION["inputs"], *ACTION["outputs"]}
    (workflow,) = [one for one in documents() if "jobs" in one]
    steps = workflow["jobs"]["doctor"]["steps"]
    (step,) = [one for one in steps if one["uses"].startswith("trainfix/trainfix@")]
    assert set(step["with"]) <= set(ACTION["inputs"])
    parsed(["doctor", *shlex.split(step["with"]["args"])])
    used = set(re.findall(r"steps\.doctor\.outputs\.([\w-]+)", PAGE))
    assert used <= set(ACTION["outputs"])


@pytest.fixture
def action(tmp_path: Path):
    """Runs the action's own script as GitHub does, and gives (what it did, its outputs)."""

    def run(**inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
        step = ACTION["runs"]["steps"][-1]
        given = {name: one["default"] for name, one in ACTION["inputs"].items()} | inputs
        own = {
            key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: given[m[1]], text) for key, text in step["env"].items()
        }
        outputs = tmp_path / "outputs"
        outputs.write_text("")
        variables = {
            **os.environ,
            **own,
            "GITHUB_OUTPUT": str(outputs),
            "RUNNER_TEMP": str(tmp_path),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(release("0.18.9")), str(CHECKOUT / "src")]),
        }
        script = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
        done = subprocess.run(script, cwd=tmp_path, env=variables, capture_output=True, text=True)
        return done, dict(line.split("=", 1) for line in outputs.read_text().splitlines())

    return run


def test_the_action_writes_sarif_shows_the_text_and_fails_with_doctors_code(action) -> None:
    done, outputs = action(config=f"  {CONFIG}\n\n")
    assert (done.returncode, outputs["exit-code"]) == (1, "1"), done.stderr
    assert outputs["sarif"] == outputs["report"]
    assert json.loads(Path(outputs["sarif"]).read_text())["version"] == "2.1.0"
    assert "[X]  TF-0001" in done.stdout


def test_the_action_passes_arguments_on_as_a_shell_would_split_them(action) -> None:
    done, outputs = action(
        config=str(CONFIG), args="--ignore TF-0001 --reason \"lost, and 'fine' by us\" --only TF-0001", format="json"
    )
    assert (done.returncode, outputs["exit-code"]) == (0, "0"), done.stderr
    (finding,) = json.loads(Path(outputs["report"]).read_text())["findings"]
    assert finding["ignored"] == "lost, and 'fine' by us"
    assert "sarif" not in outputs


def test_the_action_examines_a_lock_file(action, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("deepspeed==0.19.8\n")
    done, outputs = action(config=str(CONFIG), lock="requirements.txt", args="--only TF-0001", format="text")
    assert (done.returncode, outputs["exit-code"]) == (0, "0"), done.stderr
    assert Path(outputs["report"]).read_text() == done.stdout


def test_a_mistake_in_the_actions_inputs_gives_no_report(action) -> None:
    done, outputs = action(config="absent.json")
    assert (done.returncode, outputs) == (2, {"exit-code": "2"})
    assert "absent.json" in done.stderr


# The hook.


def test_the_hook_starts_a_module_of_the_package_and_matches_nothing_by_itself() -> None:
    assert HOOK["id"] == "trainfix-doctor"
    assert HOOK["entry"] == f"python -m {pre_commit.__name__}"
    assert not re.search(HOOK["files"], "configs/ds.json")
    assert HOOK["require_serial"]
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted = set(project["project"]["optional-dependencies"]["cli"])
    assert set(HOOK["additional_dependencies"]) <= wanted


def test_the_pages_hooks_match_configs_and_their_arguments_are_doctors() -> None:
    hooks = [hook for one in documents() for repo in one.get("repos", ()) for hook in repo["hooks"]]
    assert len(hooks) == 2
    for hook in hooks:
        assert hook["id"] == HOOK["id"]
        assert re.search(hook["files"], "configs/ds.json")
        parsed(["doctor", *hook.get("args", ())])


def hook(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """What pre-commit does with the hook: its entry, the user's arguments, then the files."""
    program = [sys.executable, *HOOK["entry"].split()[1:], *argv]
    path = os.pathsep.join([str(release("0.18.9")), str(CHECKOUT / "src")])
    return subprocess.run(program, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder with the config of a run that loses micro-batches, and of one that does not."""
    (tmp_path / "bad.json").write_text(CONFIG.read_text())
    right = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 0}}
    (tmp_path / "good.json").write_text(json.dumps(right))
    return tmp_path


def test_the_hook_judges_each_file_alone_and_ends_with_the_gravest_code(configs: Path) -> None:
    done = hook(configs, "--only", "TF-0001", "good.json", "bad.json")
    assert done.returncode == 1, done.stderr
    _, good, bad = re.split(r"^== \w+\.json\n", done.stdout, flags=re.M)
    assert "(exit 0)" in good
    assert "exit 1" in bad


def test_the_hook_passes_where_nothing_is_reached_or_the_import_is_assumed(configs: Path) -> None:
    assert hook(configs, "--only", "TF-0001", "good.json").returncode == 0
    assert hook(configs, "--only", "TF-0001", "--assume-import", "bad.json").returncode == 0


def test_a_mistake_in_the_hooks_arguments_is_said_once_with_code_2(configs: Path) -> None:
    done = hook(configs, "--strct", "good.json", "bad.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("did you mean --strict?") == 1
    assert hook(configs, "absent.json", "good.json").returncode == 2
