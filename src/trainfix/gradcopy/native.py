"""The compiled host loop, where the optional distribution `trainfix-native` is installed (native/ in the repository).

It is called through ctypes, which releases the interpreter's lock: while a worker thread adds, Python goes on.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Container, Sequence

import torch

from trainfix.gradcopy.arithmetic import TorchAdder
from trainfix.gradcopy.segments import Adder, Segment

# Counts changes of what the exported functions take and mean; native/loop.c has the same number.
ABI = 1
# The numbers that native/loop.c gives the dtypes it widens.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def adder() -> Adder | None:
    """The adder over the compiled loop, or None where that is not installed, does not load or is of another ABI."""
    library = _library()
    return None if library is None else NativeAdder(library)


class NativeAdder:
    """One call of the loop per segment, on the calling thread; the same bits as `TorchAdder`.

    What the loop does not take is left to `TorchAdder`: a master that is not float32, another device, strides.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._add = library.trainfix_native_add
        self._add.restype = ctypes.c_int
        address, number = ctypes.c_void_p, ctypes.c_int
        self._add.argtypes = [address, address, ctypes.c_size_t, number, number, address]
        self._torch = TorchAdder()

    def parts(self, segments: Sequence[Segment]) -> list[int]:
        return [1] * len(segments)

    def add(self, segments: Sequence[Segment], squares: torch.Tensor | None = None) -> None:
        """squares: float64 [number of segments], contiguous, on the host.

        Raises ValueError, having touched nothing, where a segment's two sides differ in shape or squares is another.
        """
        if squares is not None and not (_dense(squares, {torch.float64}) and squares.shape == (len(segments),)):
            raise ValueError(f"squares must be contiguous float64 of shape ({len(segments)},) on the host")
        for _, destination, gradient, _ in segments:
            if destination.shape != gradient.shape:
                sides = f"{tuple(destination.shape)} cannot take a gradient of shape {tuple(gradient.shape)}"
                raise ValueError(f"a master gradient of shape {sides}")
        for number, segment in enumerate(segments):
            _, destination, gradient, first = segment
            if _dense(destination, {torch.float32}) and _dense(gradient, DTYPES):
                place = None if squares is None else squares[number].data_ptr()
                count, dtype = destination.numel(), DTYPES[gradient.dtype]
                self._add(destination.data_ptr(), gradient.data_ptr(), count, dtype, first, place)
            else:
                self._torch.add([segment], None if squares is None else squares[number : number + 1])


def _dense(tensor: torch.Tensor, dtypes: Container[torch.dtype]) -> bool:
    """Whether the tensor is one stretch of the host's memory, of one of these dtypes."""
    return tensor.device.type == "cpu" and tensor.dtype in dtypes and tensor.is_contiguous()


def _library() -> ctypes.CDLL | None:
    try:
        found = importlib.util.find_spec("trainfix_native._loop")
    except ModuleNotFoundError:  # the package around it is not there either
        return None
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        abi = library.trainfix_native_abi()
    except (OSError, AttributeError) as error:
        reason = str(error)
    else:
        if abi == ABI:
            return library
        reason = f"it is of ABI {abi}, this release of trainfix calls ABI {ABI}"
    logging.getLogger("trainfix").warning("trainfix-native is not used, torch adds instead: %s", reason)
    return None
