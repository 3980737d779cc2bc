"""Canonical shapes: the same on every Python, from the installed text and from the live function.

`python tests/environment/test_shapes.py FOLDER` prints the shapes of every function of the three files of DeepSpeed
0.18.9 unpacked at FOLDER, as shapes_golden.json has them. It needs the standard library and src on the path.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainfix.environment import shapes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("shapes_golden.json")
MODULES = ("deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.engine")
CLASSES = {
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.runtime.zero.stage3": "DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.runtime.engine": "DeepSpeedEngine",
}
CONTEXT_MANAGERS = {"no_sync", "coalesce_grad_reduction"}  # contextlib's decorator is not one that we see through
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def functions(text: str) -> list[str]:
    """``function`` and ``Class.method`` of every one in a file, in order."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)]
    return found


def shapes_of_release(folder: Path) -> dict[str, str]:
    """``module:qualname`` -> shape, for every function of the three modules."""
    found = {}
    for module in MODULES:
        text = folder.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        for qualname in functions(text):
            shape = shapes.shape_in_text(text, qualname)
            assert shape is not None, f"{module}:{qualname} is in the text and was not found"
            found[f"{module}:{qualname}"] = shape
    return found


if __name__ == "__main__":
    print(json.dumps(shapes_of_release(Path(sys.argv[1])), indent=0))
    sys.exit()

import pytest  # noqa: E402  other interpreters run this file too, and have no pytest

from tests.support.releases import release  # noqa: E402

SAMPLE = '''
import functools

class Optimizer:
    """Docstring."""

    @staticmethod
    def plain(a, b=1):
        return a + b

    # a comment
    def step(self, closure=None):
        """Docstring, two lines.

Shallow text inside it."""
        text = """
shallow
"""
        if closure:
            return {text: [1, 2.5, None, b"x"]}
        return f"{self!r:>{8}} and {closure}"

    @functools.wraps(
        step,
        assigned=(),
    )
    def several(
        self,
        key,
    ):
        return key


def step(x):
    return x
'''


def shape(body: str, name: str = "f") -> str | None:
    """Shape of function `name` in `body`."""
    return shapes.shape_in_text(body, name)


@pytest.mark.slow
def test_this_python_agrees_with_the_golden_shapes_on_every_function_of_deepspeed_0_18_9() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(golden) > 400
    assert shapes_of_release(release("0.18.9")) == golden


def other_pythons() -> list[str]:
    """The interpreters of other supported versions that start on this machine."""
    found = []
    for version in PYTHONS:
        python = shutil.which(f"python{version}")
        if python is None or sys.version_info[:2] == tuple(map(int, version.split("."))):
            continue
        environment = os.environ | {"PYENV_VERSION": version}
        if subprocess.run([python, "-c", ""], env=environment, capture_output=True, check=False).returncode == 0:
            found.append(version)
    return found


@pytest.mark.slow
def test_the_other_pythons_here_agree_with_the_golden_shapes(record_property: Any) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    others = other_pythons()
    record_property("pythons", others)  # where there is no other, the test above is the one that counts
    for version in others:
        done = subprocess.run(
            [f"python{version}", str(Path(__file__)), str(release("0.18.9"))],
            env=os.environ | {"PYENV_VERSION": version, "PYTHONPATH": str(ROOT / "src"), "TRAINFIX": "off"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == golden, f"Python {version} hashes differently"


LIVE = """
import importlib, json, sys, types
from trainfix.environment import shapes
answer = {}
for name, cls in json.loads(sys.argv[1]).items():
    module = importlib.import_module(name)
    for method, live in vars(getattr(module, cls)).items():
        live = (live.fset or live.fget) if isinstance(live, property) else live  # in the text the last one counts
        plain = shapes.unwrap(live)
        if plain is not None and plain.__code__.co_filename == module.__file__:
            wrapped = plain is not live and type(live) is types.FunctionType
            answer[f"{name}:{cls}.{plain.__name__}"] = [shapes.shape_of_function(live), wrapped]
print(json.dumps(answer))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("version", "instrumented"), [("0.18.9", 20), ("0.19.8", 20)])
def test_live_functions_have_the_shapes_of_the_text(version: str, instrumented: int) -> None:
    folder = release(version)
    done = subprocess.run(
        [sys.executable, "-c", LIVE, json.dumps(CLASSES)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT)]), "TRAINFIX": "off"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    live = json.loads(done.stdout.splitlines()[-1])
    text = shapes_of_release(folder)
    methods = {path for path in text if path.partition(":")[2].rpartition(".")[0] in CLASSES.values()}
    uncompared = {path.rpartition(".")[2] for path in methods - set(live)}
    assert uncompared <= CONTEXT_MANAGERS, "methods that were not compared"
    different = {path: (found, text[path]) for path, (found, _) in live.items() if path in text and found != text[path]}
    assert not different
    behind = [path for path, (_, wrapped) in live.items() if wrapped and ":DeepSpeedZeroOptimizer_Stage3." in path]
    assert len(behind) >= instrumented
    engine = "deepspeed.runtime.engine:DeepSpeedEngine."
    assert all(live[engine + name][1] for name in ("forward", "backward", "allreduce_gradients"))


def test_what_carries_no_meaning_does_not_change_a_shape() -> None:
    plain = shape("def f(a, b=1):\n    return a + b\n")
    assert plain is not None and len(plain) == shapes.DIGITS
    assert shape('def f(a, b=1):\n    """Docstring."""\n\n    # comment\n    return (a +\n        b)\n') == plain
    assert shape("@instrument_w_nvtx\ndef f(a, b=1):\n    return a + b\n") == plain
    assert shape("@torch.no_grad()\n@instrument_w_nvtx\ndef f(a, b=1):\n    return a + b\n") == plain
    assert shape("import x\n\nclass C:\n    def f(a, b=1):\n        return a + b\n", "C.f") == plain


@pytest.mark.parametrize(
    "body",
    [
        "def f(a, b=2):\n    return a + b\n",
        "def f(a, c=1):\n    return a + c\n",
        "def f(a, b=1):\n    return a - b\n",
        "def f(a, b=1):\n    return b + a\n",
        "def f(a, b=1):\n    a + b\n",
        "def f(a, b=1.0):\n    return a + b\n",
        "def f(a, b=True):\n    return a + b\n",
        "def f(a, *, b=1):\n    return a + b\n",
        "def f(a, b=1):\n    return None\n",
        "async def f(a, b=1):\n    return a + b\n",
        "@property\ndef f(a, b=1):\n    return a + b\n",
    ],
)
def test_what_carries_meaning_changes_it(body: str) -> None:
    found = shape(body)
    assert found is not None
    assert found != shape("def f(a, b=1):\n    return a + b\n")


def test_methods_are_found_by_class_and_name_and_the_last_definition_counts() -> None:
    inside, outside = shape(SAMPLE, "Optimizer.step"), shape(SAMPLE, "step")
    assert inside and outside and inside != outside
    undecorated = "def several(\n    self,\n    key,\n):\n    return key\n"
    assert shape(SAMPLE, "Optimizer.several") != shape(undecorated, "several")
    for missing in ("Optimizer.missing", "missing", "Missing.step", "Optimizer.step.inner"):
        assert shape(SAMPLE, missing) is None
    twice = "def f():\n    return 1\n\ndef f():\n    return 2\n"
    assert shape(twice) == shape("def f():\n    return 2\n")


def test_a_live_function_has_the_shape_of_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shape_sample.py").write_text(SAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import shape_sample

    optimizer = shape_sample.Optimizer
    assert shapes.shape_of_function(optimizer.step) == shape(SAMPLE, "Optimizer.step")
    assert shapes.shape_of_function(optimizer().step) == shape(SAMPLE, "Optimizer.step")
    assert shapes.shape_of_function(vars(optimizer)["plain"]) == shape(SAMPLE, "Optimizer.plain")
    assert shapes.shape_of_function(shape_sample.step) == shape(SAMPLE, "step")


@pytest.mark.parametrize("function", [len, print, str.join, int, object(), None, eval("lambda: 1")])
def test_what_has_no_source_has_no_shape(function: object) -> None:
    assert shapes.shape_of_function(function) is None


def test_the_self_check_speaks_of_python_and_not_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_SAMPLE_SHAPE", "0" * shapes.DIGITS)
    shapes._check_sample.cache_clear()
    with pytest.raises(shapes.ShapeError) as caught:
        shapes.shape_in_text(SAMPLE, "step")
    monkeypatch.undo()
    shapes._check_sample.cache_clear()
    assert str(caught.value).startswith("this Python hashes trainfix's bundled sample as")
    assert "Nothing is wrong with your packages; use Python 3.10 to 3.13 or a newer trainfix." in str(caught.value)
    assert shapes.shape_in_text(SAMPLE, "step")
