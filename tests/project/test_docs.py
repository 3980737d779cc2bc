"""The pages in docs/: links lead somewhere, commands are commands, programs run, data parses."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.project.test_readme import run
from trainfix.cli import _parsers

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(CHECKOUT / "docs").glob("*.md"), *(CHECKOUT / "patches").glob("*/README.md")])
BLOCKS = [
    (page.relative_to(CHECKOUT), language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
]
CHECKED = {"python", "console", "json", "yaml", "toml", "text", "diff", "bash", "sh"}


def of(*languages: str) -> list[object]:
    return [
        pytest.param(text, id=f"{page}:{number}")
        for number, (page, language, text) in enumerate(BLOCKS)
        if language in languages
    ]


def test_every_block_says_what_it_is() -> None:
    assert [(str(page), language) for page, language, _ in BLOCKS if language not in CHECKED] == []


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(CHECKOUT))) for page in PAGES])
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("block", of("console", "bash", "sh"))
def test_every_command_of_trainfix_is_one(block: str) -> None:
    lines = [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["trainfix"]:
            parser, commands = _parsers()
            assert words[1] in commands, line
            parser.parse_args(words[1:])


@pytest.mark.parametrize("block", of("python"))
def test_every_program_runs(block: str) -> None:
    done: subprocess.CompletedProcess[str] = run(sys.executable, "-c", block)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", of("json"))
def test_every_json_block_parses(block: str) -> None:
    json.loads(block)


@pytest.mark.parametrize("block", of("yaml"))
def test_every_yaml_block_parses(block: str) -> None:
    assert list(yaml.safe_load_all(block))
