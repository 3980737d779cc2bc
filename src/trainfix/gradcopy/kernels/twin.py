"""The sum as a CUDA C++ kernel, which the NVRTC of torch compiles at run time, where there is no Triton."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainfix.gradcopy.kernels import Unavailable
from trainfix.gradcopy.kernels.launches import KernelAdder

THREADS = 256  # as in bucket.cu
_GRADIENTS = {torch.bfloat16: "GRADIENT_BF16", torch.float16: "GRADIENT_FP16", torch.float32: "GRADIENT_FP32"}


class TwinAdder(KernelAdder):
    """The Adder of NVIDIA GPUs without Triton (on Windows).

    Raises Unavailable where this torch cannot compile CUDA C++. Some releases want to know a CUDA toolkit's folder,
    though no header of it is read, and raise OSError at the first sum where they find none.
    """

    def __init__(self, device: torch.device, programs: int | None = None) -> None:
        if not hasattr(torch.cuda, "_compile_kernel"):
            raise Unavailable(f"torch {torch.__version__} has no torch.cuda._compile_kernel")
        super().__init__(device, programs)
        self._kernels = dict[tuple[str, ...], Callable[..., None]]()

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
        chosen = variant(gradient.dtype, first=first, aligned=vector > 1, squares=squares is not None)
        if chosen not in self._kernels:
            compile_kernel: Any = torch.cuda._compile_kernel
            self._kernels[chosen] = compile_kernel(source(chosen), "add_rows")
        # torch's launcher takes no null pointer: the destination stands where a kernel without squares reads none.
        arguments = [gradient, destination, rows, destination if squares is None else squares, rows.shape[0]]
        self._kernels[chosen](grid=(programs, 1, 1), block=(THREADS, 1, 1), args=arguments)


def variant(dtype: torch.dtype, *, first: bool, aligned: bool, squares: bool) -> tuple[str, ...]:
    """The names that bucket.cu is compiled with for gradients of this dtype."""
    chosen = {"FIRST": first, "ALIGNED": aligned, "SQUARES": squares}
    return (_GRADIENTS[dtype], *(name for name, wanted in chosen.items() if wanted))


def source(names: tuple[str, ...]) -> str:
    """The CUDA C++ text of one variant."""
    # The empty line first: what some releases of torch put before the text must not stand on a line with a #define.
    defines = "".join(f"\n#define {name}" for name in names)
    return f"{defines}\n{Path(__file__).with_name('bucket.cu').read_text(encoding='utf-8')}"
