"""The README is executed: every command and every Python block, their output compared after masking numbers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import packaging
import pytest

from tests.support.releases import release

CHECKOUT = Path(__file__).resolve().parents[2]
TEXT = (CHECKOUT / "README.md").read_text(encoding="utf-8")
RELEASE = "0.18.9"
# The checks that `make test` runs, in its order, and the line each ends with.
CHECKS = (("ruff check .", "All checks passed!"), ("mypy", r"Success: no issues found in # source files"))


@dataclass(frozen=True)
class Command:
    """A line `$ line` of a console block, what it printed, and the exit code when the block says it."""

    line: str
    output: str
    code: int


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)


def commands() -> Iterator[Command]:
    """Every command of the console blocks."""
    for text in (text for language, text in blocks() if language == "console"):
        before, *parts = re.split(r"^\$ ", text, flags=re.M)
        assert not before, f"a console block begins with a command, not with {before.splitlines()[0]!r}"
        for part in parts:
            line, _, rest = part.partition("\n")
            output, *code = re.split(r"^\(exit code (\d+), as expected\)$", rest, maxsplit=1, flags=re.M)
            yield Command(line, output, int(code[0]) if code else 0)


def programs() -> list[tuple[str, str]]:
    """(Python block, what it prints: the text block that follows a block with a print, else nothing)."""
    found = blocks()
    pairs = zip(found, [*found[1:], ("", "")], strict=True)
    return [(text, after if "print(" in text else "") for (language, text), (_, after) in pairs if language == "python"]


def masked(text: str) -> list[str]:
    """The lines of a text, every number as #, every run of spaces as one."""
    numbers = re.sub(r"[-+]?\d+(?:\.\d+)*(?:e[-+]?\d+)?", "#", text.strip())
    return [re.sub(r"\s+", " ", line).strip() for line in numbers.splitlines()]


def run(*command: str, beside: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, with DeepSpeed 0.18.9 and trainfix laid over this environment."""
    path = os.pathsep.join(map(str, [release(RELEASE), CHECKOUT / "src", *beside]))
    variables = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, check=False)


def without_the_tests_packages(folder: Path) -> Path:
    """What a reader of `make demo` alone has beside DeepSpeed, as far as doctor looks: torch, and packaging."""
    site = Path(packaging.__file__).parents[1]
    for found in (site / "packaging", *site.glob("packaging-*.dist-info"), *site.glob("torch-*.dist-info")):
        (folder / found.name).symlink_to(found)
    return folder


SHOWN = [command for command in commands() if not command.line.startswith("make ")]


def test_the_readme_shows_the_commands_and_the_programs() -> None:
    assert {command.line.split()[1] for command in SHOWN} == {"doctor", "prove"}
    assert len(programs()) == sum(language == "python" for language, _ in blocks()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("command", SHOWN, ids=lambda command: command.line)
def test_a_command_prints_what_the_readme_shows(command: Command, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command.line)
    assert program == "trainfix"
    if arguments[0] == "doctor":
        beside = [without_the_tests_packages(tmp_path)]
        done = run(sys.executable, "-S", "-m", program, *arguments, beside=beside)
    else:
        done = run(sys.executable, "-m", program, *arguments)
    assert done.returncode == command.code, done.stderr
    assert masked(done.stdout) == masked(command.output)


@pytest.mark.parametrize(("program", "output"), programs(), ids=["import", "status"])
def test_a_python_block_runs_and_prints_what_the_readme_shows(program: str, output: str) -> None:
    done = run(sys.executable, "-W", "error::ImportWarning", "-c", program)
    assert done.returncode == 0, done.stderr
    printed = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("["))
    assert masked(printed) == masked(output)


def test_the_summary_line_is_the_one_that_the_readme_shows() -> None:
    (shown,) = [text for language, text in blocks() if language == "text" and text.startswith("trainfix 0.")]
    done = run(sys.executable, "-c", programs()[0][0])
    assert shown.strip() in done.stderr.splitlines()


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"make ([a-z]+)", TEXT))
    assert {"demo", "test", "check", "matrix"} <= named <= targets


def test_make_demo_runs_the_commands_that_the_readme_shows() -> None:
    source = (CHECKOUT / "demo" / "run.py").read_text(encoding="utf-8")
    assert re.findall(r'^(?:DOCTOR|PROVE) = \("(.*)", (\d)\)$', source, re.M) == [(c.line, str(c.code)) for c in SHOWN]


def test_make_test_runs_the_checks_that_the_readme_shows() -> None:
    shown = next(command.output for command in commands() if command.line == "make test")
    recipe = run("make", "--dry-run", "test").stdout
    places = [recipe.index(f"bin/{check}\n") for check, _ in CHECKS] + [recipe.index("-m pytest")]
    assert places == sorted(places)
    lines = masked(shown)
    assert [ending for _, ending in CHECKS if ending in lines] == [ending for _, ending in CHECKS]
    assert re.fullmatch(r"=* ?# passed in #s(?: \(#:#:#\))? ?=*", lines[-1])


def test_every_file_that_the_readme_links_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert links
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(TRAINFIX\w*)", TEXT))))
def test_every_variable_that_the_readme_names_is_one_that_trainfix_reads(name: str) -> None:
    from trainfix.settings import VARIABLES

    assert name in VARIABLES
