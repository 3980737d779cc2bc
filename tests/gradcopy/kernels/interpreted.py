"""Runs the Triton kernel in Triton's interpreter, as it is and with errors put into it. Prints complaints as JSON.

`TRITON_INTERPRET=1 python -m tests.gradcopy.kernels.interpreted FOLDER`, with triton and a numpy before 2.4 on
PYTHONPATH: with later ones, a loop whose bounds are tensors fails in the interpreter.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

from tests.gradcopy.kernels.buckets import CPU, caught
from trainfix.gradcopy import kernels
from trainfix.gradcopy.kernels.launches import KernelAdder

STORED = "tl.store(destination + place + lane, total,"
ADDED = 'cache_modifier=".cg") + total'
ERRORS = {
    "adds in bf16": (ADDED, 'cache_modifier=".cg").to(tl.bfloat16) + total.to(tl.bfloat16)'),
    "leaves out the last row": ("range(tl.program_id(0), rows,", "range(tl.program_id(0), rows - 1,"),
    "adds a first gradient to zero": (STORED, STORED.replace("total", "total + 0.0")),
    "adds where it should store": ("if not FIRST:", "if True:"),
    "stores where it should add": ("if not FIRST:", "if False:"),
    "leaves out the last element of a row": ("inside = lane < count", "inside = lane < count - 1"),
    "squares in float32": ("wide = total.to(tl.float64)", "wide = total"),
    "squares the gradient, not the sum": (
        "wide = total.to(tl.float64)",
        "wide = part.to(tl.float64)",
    ),
    "places all squares of a bucket at its first": ("tl.store(squares + tl.load(entry + 3)", "tl.store(squares"),
}


def main(folder: Path) -> None:
    numbers = itertools.count()

    def make(text: str) -> KernelAdder:
        # From a file: triton reads a kernel's text where it was defined.
        file = folder / f"bucket_{next(numbers)}.py"
        file.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.TritonAdder(CPU, programs=3)

    text = Path(kernels.__file__).with_name("bucket.py").read_text(encoding="utf-8")
    json.dump(caught(make, text, ERRORS), sys.stdout, indent=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
