"""The sum as a Triton kernel. Imports triton, so this module is imported only where the kernel is asked for.

Runs under TRITON_INTERPRET=1 as well, on tensors on the CPU, if that is set before this module is imported.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from trainfix.gradcopy.kernels.launches import KernelAdder
from trainfix.gradcopy.kernels.table import BODY_BLOCK, DESTINATION_VECTOR, REST_BLOCK

WARPS = 8


class TritonAdder(KernelAdder):
    """The Adder of GPUs that have Triton, which torch brings along on Linux."""

    def _launch(
        self,
        gradient: torch.Tensor,
        destination: torch.Tensor,
        rows: torch.Tensor,
        squares: torch.Tensor | None,
        *,
        first: bool,
        vector: int,
        programs: int,
    ) -> None:
        add_rows[(programs,)](
            gradient,
            destination,
            rows,
            squares,
            rows.shape[0],
            FIRST=first,
            VECTOR=vector,
            DESTINATION_VECTOR=DESTINATION_VECTOR if vector > 1 else 1,
            BLOCK=BODY_BLOCK if vector > 1 else REST_BLOCK,
            num_warps=WARPS,
            num_stages=1,
        )


# Not specialised on the number of rows: each of its kinds (1, a multiple of 16) would be compiled once more, in a step.
@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def add_rows(  # type: ignore[no-untyped-def]
    gradient,
    destination,
    table,
    squares,
    rows,
    FIRST: tl.constexpr,
    VECTOR: tl.constexpr,
    DESTINATION_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # As many programs as the grid has go through all rows: the grid bounds the multiprocessors that are taken.
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + row * 4
        source = tl.load(entry)
        place = tl.load(entry + 1)
        count = tl.load(entry + 2)
        # Without these hints the loads and stores are of one element each.
        source = tl.multiple_of(source, VECTOR)
        place = tl.multiple_of(place, DESTINATION_VECTOR)
        count = tl.multiple_of(count, VECTOR)
        lane = tl.arange(0, BLOCK)
        inside = lane < count
        part = tl.load(gradient + source + lane, mask=inside, other=0.0)
        if gradient.dtype.element_ty == tl.bfloat16:
            # bfloat16 is the upper half of a float32. Triton's interpreter converts its subnormals wrongly.
            total = (part.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            total = part.to(tl.float32)
        if not FIRST:  # a first gradient is stored, not added to zero: 0 + -0 is 0
            total = tl.load(destination + place + lane, mask=inside, other=0.0, cache_modifier=".cg") + total
        tl.store(destination + place + lane, total, mask=inside, cache_modifier=".cs")
        if squares is not None:
            wide = total.to(tl.float64)
            tl.store(squares + tl.load(entry + 3), tl.sum(wide * wide, axis=0))
