"""Compiles the Triton kernel for GPUs that need not be here, and prints what the machine code takes, as JSON.

`python -m tests.gradcopy.kernels.compiled`, with triton on PYTHONPATH: its wheel brings ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gradcopy.kernels.machine_code import resources
from trainfix.gradcopy.kernels import bucket
from trainfix.gradcopy.kernels.bucket import WARPS, add_rows
from trainfix.gradcopy.kernels.table import BODY_BLOCK, DESTINATION_VECTOR, REST_BLOCK
from trainfix.gradcopy.segments import Segment

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VECTORS = {"bf16": 8, "fp16": 8, "fp32": 4}
# What most steps run, each dtype aligned; and for one dtype the others.
VARIANTS = [
    *((dtype, "aligned", "later", "squares") for dtype in VECTORS),
    ("bf16", "aligned", "first", "no squares"),
    ("bf16", "rest", "later", "squares"),
    ("fp32", "rest", "later", "squares"),
]


def compiled(capability: int, dtype: str, place: str, window: str, squares: str) -> bytes:
    aligned, taken = place == "aligned", squares == "squares"
    constants = {
        "FIRST": window == "first",
        "VECTOR": VECTORS[dtype] if aligned else 1,
        "DESTINATION_VECTOR": DESTINATION_VECTOR if aligned else 1,
        "BLOCK": BODY_BLOCK if aligned else REST_BLOCK,
        **({} if taken else {"squares": None}),
    }
    signature = {"gradient": f"*{dtype}", "destination": "*fp32", "table": "*i64", "squares": "*fp64", "rows": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    at_16_bytes = [["tt.divisibility", 16]]  # what the launcher finds of every pointer that torch allocated
    pointers = {(position,): at_16_bytes for position in range(4 if taken else 3)}
    source = ASTSource(add_rows, signature, constexprs=constants, attrs=pointers)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": WARPS, "num_stages": 1}).asm["cubin"]


class NoDriver:
    """Says which GPU to compile for. Triton asks it when a kernel is called."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels_of_a_run() -> int:
    """How many kernels are compiled for buckets of many sizes: by the real calls, all but the launch itself."""
    triton.runtime.driver.set_active(NoDriver())
    hashes = set()

    class Compiling:
        def __getitem__(self, grid: tuple[int]):
            return lambda *arguments, **keywords: hashes.add(add_rows.warmup(*arguments, grid=grid, **keywords).hash)

    bucket.add_rows = Compiling()
    adder = bucket.TritonAdder(torch.device("cpu"))
    for rows, first, taken in itertools.product((1, 3, 16, 32), (True, False), (True, False)):
        elements = rows * BODY_BLOCK
        segments = [Segment(0, torch.zeros(elements), torch.zeros(elements, dtype=torch.bfloat16), first)]
        adder.add(segments, torch.zeros(rows, dtype=torch.float64) if taken else None)
    return len(hashes)


def main() -> None:
    found = {}
    for capability in (80, 90):
        for variant in VARIANTS:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled(capability, *variant))
                cubin.flush()
                found[f"sm_{capability} {' '.join(variant)}"] = resources(Path(cubin.name), TOOLS)
    found["kernels of a run"] = kernels_of_a_run()
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
