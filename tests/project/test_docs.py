"""The pages in docs/: links lead somewhere, commands are commands, programs run, data parses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.project.test_readme import run
from trainfix.cli import _parsers
from trainfix.environment import toml

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md"), *(CHECKOUT / "patches").glob("*/README.md")]
)
BLOCKS = [
    (page.relative_to(CHECKOUT), language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
]
CHECKED = {"python", "console", "json", "yaml", "toml", "text", "diff", "bash", "ini", "sh"}


def of(*languages: str, but: str = "") -> list[object]:
    return [
        pytest.param(text, id=f"{page}:{number}")
        for number, (page, language, text) in enumerate(BLOCKS)
        if language in languages and str(page) != but
    ]


def test_every_block_says_what_it_is() -> None:
    assert [(str(page), language) for page, language, _ in BLOCKS if language not in CHECKED] == []


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(CHECKOUT))) for page in PAGES])
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


COMMANDS = [
    line.removeprefix("$ ")
    for _, language, text in BLOCKS
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("$ trainfix ") or (language == "bash" and line.startswith("trainfix "))
]


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_every_command_of_trainfix_is_one(line: str) -> None:
    _, command, *words = shlex.split(line, comments=True)
    parser, commands = _parsers()
    assert command in commands
    parser.parse_args([command, *words])


@pytest.mark.slow
@pytest.mark.parametrize("block", of("python", but="README.md"))  # which test_readme runs
def test_every_program_runs(block: str) -> None:
    done: subprocess.CompletedProcess[str] = run(sys.executable, "-c", block)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", of("json", "yaml"))
def test_every_block_of_data_parses(block: str) -> None:
    assert list(yaml.safe_load_all(block))  # JSON is YAML, too


@pytest.mark.parametrize("block", of("toml"))
def test_every_toml_block_parses(block: str) -> None:
    assert toml.loads(block)
