"""The rules of the house that no other test would notice being broken."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = CHECKOUT / "src" / "trainfix"
MODULES = sorted(SOURCES.rglob("*.py"))

# Who may import whom: part -> the parts it may import. `cli` may import everything.
ALLOWED = {
    "trainfix": {"engine"},
    "settings": set(),
    "activation": {"settings"},
    "environment": set(),
    "advisories": {"environment"},
    "engine": {"advisories", "environment", "settings"},
    "gradcopy": set(),
    "fixes": {"gradcopy", "engine"},
    "measure": set(),
    "ledger": {"measure", "engine", "settings"},
    "proofs": {"measure", "engine", "advisories", "environment"},
}
# Names that anyone may take from the package itself, such as __version__ and the public functions.
OPEN_TO_ALL = {"trainfix"}

REQUIRED = {"packaging", "wrapt"}
OF_THE_COMMAND_LINE = {"rich", "yaml", "tomli"}
# Imported under these names where activation puts its bootstrap folder on the path.
OF_THE_BOOTSTRAP = {"_trainfix_waiting", "sitecustomize"}
# What torch's own CUDA builds bring along.
OF_THE_DEVICE = {"triton"}
# What is repaired and measured. Only a body that runs after the user's own import may use these.
REPAIRED = {"torch", "deepspeed", "transformers", "accelerate", "trl", "llamafactory", "openrlhf", "torchao"}
REPAIRED |= {"datasets", "tokenizers"}  # what their trainers take
USERS_OF_REPAIRED = {"fixes", "gradcopy", "measure", "ledger", "proofs", "engine"}
# What a bare `import trainfix` or any command may load.
EARLY = {"trainfix", "__main__", "settings", "environment", "advisories", "engine", "activation", "cli"}

MACHINE_PATHS = re.compile(r"(?<![\w.$}/-])/(?:home|root|Users|work|tmp|opt|mnt|data|scratch)/\w")


def part_of(module: str) -> str:
    """`trainfix.engine.finder` -> `engine`; the package's own __init__ -> `trainfix`."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in {*ALLOWED, "cli", "ledger", "__main__"} else names[0]


def module_name(path: Path) -> str:
    """The dotted name of a source file."""
    names = ("trainfix", *path.relative_to(SOURCES).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def for_types_only(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Every absolute name that a file imports when it runs, `from x import y` as `x.y`."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        if not for_types_only(node) and not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def internal_edges() -> Iterator[tuple[str, str, Path]]:
    """(part, part it imports, file) for every import inside the package."""
    for path in MODULES:
        for name in imports(path):
            if name.split(".")[0] == "trainfix":
                yield part_of(module_name(path)), part_of(name), path


def tracked_files() -> list[Path]:
    """Every file that is or could be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := CHECKOUT / name).is_file()]


def test_every_part_of_the_package_is_named_in_the_import_rules() -> None:
    parts = {part_of(module_name(path)) for path in MODULES}
    assert parts <= {*ALLOWED, "cli", "__main__"}, "give the new part its line in ALLOWED"


def test_parts_import_only_what_stands_below_them() -> None:
    wrong = {
        f"{path.relative_to(CHECKOUT)}: {part} imports {other}"
        for part, other, path in internal_edges()
        if part not in {"cli", "__main__", other} and other not in OPEN_TO_ALL | ALLOWED[part]
    }
    assert not wrong


def test_the_import_rules_have_no_circle() -> None:
    left = {part: set(others) for part, others in ALLOWED.items()}
    while left:
        free = {part for part, others in left.items() if not others & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {part: others for part, others in left.items() if part not in free}


def test_measure_and_gradcopy_name_no_advisory() -> None:
    files = [path for part in ("measure", "gradcopy") for path in (SOURCES / part).rglob("*.py")]
    assert files
    assert not [path.name for path in files if re.search(r"TF-\d", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_needs_no_package_that_is_not_required(path: Path) -> None:
    part = part_of(module_name(path))
    admitted = {"trainfix", *sys.stdlib_module_names, *REQUIRED}
    admitted |= OF_THE_COMMAND_LINE if part in {"cli", "environment"} else set()
    admitted |= OF_THE_BOOTSTRAP if part == "activation" else set()
    admitted |= OF_THE_DEVICE if part == "gradcopy" else set()
    admitted |= REPAIRED if part in USERS_OF_REPAIRED else set()
    assert {name.split(".")[0] for name in imports(path)} <= admitted


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(module_name(path)) in EARLY], ids=module_name)
def test_a_module_that_starts_early_imports_only_the_standard_library_at_its_top(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path, top_only=True)}
    assert tops <= {"trainfix", *OF_THE_BOOTSTRAP, *sys.stdlib_module_names}


def test_the_run_time_requirements_are_packaging_and_wrapt() -> None:
    declared = re.search(r"^dependencies = \[(.*?)\]$", (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert declared is not None
    assert set(re.findall(r'"([\w-]+)', declared[1])) == REQUIRED


def test_no_file_names_a_path_of_a_machine() -> None:
    found = []
    for path in tracked_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(CHECKOUT)}: {hit[0]}" for hit in MACHINE_PATHS.finditer(text)]
    assert not found


def test_the_version_stands_in_one_place() -> None:
    version = re.search(r'^__version__ = "(.+)"$', (SOURCES / "__init__.py").read_text(encoding="utf-8"), re.M)
    assert version is not None
    assert 'dynamic = ["version"]' in (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n## [{version[1]}]" in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version[1]}\n" in (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")
