"""Runs bucket.cu on threads of the host, as it is and with errors put into it. Prints complaints as JSON.

`python -m tests.gradcopy.kernels.emulated FOLDER`, with g++ on PATH. A 16-byte access that is not at 16 bytes ends the
process. What this cannot show: the GPU's memory model, and fp16 by the GPU's own instruction.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.gradcopy.kernels.buckets import CPU, DTYPES, caught
from trainfix.gradcopy.kernels import twin
from trainfix.gradcopy.kernels.launches import KernelAdder

SHIM = Path(__file__).with_name("threads.h")
ADDED = "total[step][part].of[lane] += value;"
STORED = "total[step][part].of[lane] = value;"
ERRORS = {
    "adds in bf16": (ADDED, f"{ADDED} total[step][part].of[lane] = widen(narrow(total[step][part].of[lane]));"),
    "leaves out the last row": ("row < rows;", "row < rows - 1;"),
    "adds a first gradient to zero": (STORED, "total[step][part].of[lane] = 0.0f + value;"),
    "leaves out a warp's squares": ("warp < THREADS / 32; ++warp", "warp < THREADS / 32 - 1; ++warp"),
    "places all squares of a bucket at its first": ("squares[entry[3]] = sum", "squares[0] = sum"),
}
# Where narrow is wanted: bf16 by cutting off.
NARROW = "static inline unsigned short narrow(float value) { word bits; memcpy(&bits, &value, 4); return bits >> 16; }"


def library(text: str, folder: Path) -> ctypes.CDLL:
    """All variants in one library, each function by the name of `function`."""
    (folder / "bucket.cu").write_text(text, encoding="utf-8")
    parts = [f'#include "{SHIM}"', "typedef unsigned int word;", NARROW]
    names = {line.split()[1].split("(")[0] for line in text.splitlines() if line.startswith("#define ")}
    for variant in variants():
        kernel = function(variant)
        parts += [f"namespace in_{kernel} {{", f"#define add_rows {kernel}"]
        parts += [f"#define {name}" for name in variant]
        parts += ['#include "bucket.cu"', "}"]
        parts += [f"#undef {name}" for name in (*variant, *sorted(names), "add_rows")]
        parts.append(
            f'extern "C" void run_{kernel}(int blocks, void *gradient, void *destination, void *table, void *squares, '
            f"int rows) {{ on_threads(in_{kernel}::{kernel}, blocks, (const in_{kernel}::gradient_type *)gradient, "
            "(float *)destination, (const long long *)table, (double *)squares, rows); }"
        )
    (folder / "all.cpp").write_text("\n".join(parts), encoding="utf-8")
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    built = folder / "all.so"
    subprocess.run(["g++", *options, str(folder / "all.cpp"), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def variants() -> list[tuple[str, ...]]:
    return [
        twin.variant(dtype, first=first, aligned=aligned, squares=squares)
        for dtype, first, aligned, squares in itertools.product(DTYPES, *[(True, False)] * 3)
    ]


def function(variant: Sequence[str]) -> str:
    return "_".join(variant).lower()


def main(folder: Path) -> None:
    numbers = itertools.count()

    def make(text: str) -> KernelAdder:
        place = folder / str(next(numbers))
        place.mkdir()
        loaded = library(text, place)

        def compile_kernel(source: str, name: str) -> Callable[..., None]:
            assert name == "add_rows"
            variant = [line.split()[1] for line in source.partition("//")[0].splitlines() if line]
            run = getattr(loaded, f"run_{function(variant)}")

            def kernel(*, grid: tuple[int, int, int], block: tuple[int, int, int], args: list) -> None:
                assert block == (256, 1, 1), block
                *tensors, rows = args
                run(grid[0], *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), ctypes.c_int(rows))

            return kernel

        torch.cuda._compile_kernel = compile_kernel
        return twin.TwinAdder(CPU, programs=3)

    text = Path(twin.__file__).with_name("bucket.cu").read_text(encoding="utf-8")
    json.dump(caught(make, text, ERRORS), sys.stdout, indent=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
