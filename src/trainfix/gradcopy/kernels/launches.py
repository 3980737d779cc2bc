"""What the two kernels share: a bucket's tensors as two bases and a table of offsets that stays on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from trainfix.gradcopy.kernels.table import Launch, Span, table

if TYPE_CHECKING:
    from trainfix.gradcopy.segments import Segment

VECTOR_BYTES = 16
LAYOUTS = 1024  # tables that are kept: the buckets of a step recur, window after window
PROGRAMS_PER_SM = 4
_GRADIENTS = (torch.bfloat16, torch.float16, torch.float32)


class Layout(NamedTuple):
    """A bucket's launches, each with its rows on the device: int64 [rows, 4]. parts: one count per segment."""

    launches: tuple[tuple[Launch, torch.Tensor], ...]
    parts: list[int]


class KernelAdder(ABC):
    """An Adder whose sum is one kernel: two launches where a bucket has unaligned segments, one where it has none.

    That is per pair of memories (a gradient's and a destination's), and twice where some segments are first and some
    are not. `programs` bounds how many run at once, and so the multiprocessors that are taken from the computation.
    Nothing waits for the device but the first call with a new layout, which carries its table there.
    """

    def __init__(self, device: torch.device, programs: int | None = None) -> None:
        self._device = device
        self._programs = programs or PROGRAMS_PER_SM * _multiprocessors(device)
        self._layouts = dict[tuple[Span, ...], Layout]()

    def parts(self, segments: Sequence[Segment]) -> list[int]:
        """How many partial sums of squares each segment gives. The same whether it is first or not."""
        return list(self._layout(_located(segments, self._device)[0]).parts)

    def add(self, segments: Sequence[Segment], squares: torch.Tensor | None = None) -> None:
        """Store or add each segment's gradient in its destination, on the current stream of the adder's device.

        gradients: [n], bfloat16, float16 or float32, on that device. destinations: [n], float32, there or pinned.
        squares: float64 [sum of parts], there or pinned. Memory must not be reused before the stream has come by.
        Raises ValueError, having touched nothing, where a tensor is none of these, or two destinations overlap.
        """
        spans, gradients, destinations = _located(segments, self._device)
        layout = self._layout(spans)
        _check_squares(squares, sum(layout.parts))
        with _current(self._device):
            for launch, rows in layout.launches:
                self._launch(
                    gradients[launch.gradient_base],
                    destinations[launch.destination_base],
                    rows,
                    squares,
                    first=segments[0].first != launch.turned,
                    vector=launch.vector,
                    programs=min(self._programs, rows.shape[0]),
                )

    @abstractmethod
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
        """Do the rows in one launch. vector: how many elements of the gradient are 16 bytes, 1 where not aligned."""

    def _layout(self, spans: tuple[Span, ...]) -> Layout:
        known = self._layouts.get(spans)
        if known is not None:
            return known
        made = table(spans)
        if len(self._layouts) >= LAYOUTS:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # until no launch reads a table that is given back here
            self._layouts.clear()
        # Not asynchronous: the tables are on the device when this returns, for whichever stream reads them.
        on_device = [
            torch.frombuffer(rows, dtype=torch.int64).view(-1, 4).to(self._device) for rows in made.rows.values()
        ]
        layout = Layout(tuple(zip(made.rows, on_device, strict=True)), made.parts)
        self._layouts[spans] = layout
        return layout


class _Bases(NamedTuple):
    """For each tensor the number of its base, its offset there in elements, and whether the base is at 16 bytes."""

    memories: list[torch.Tensor]
    of: list[tuple[int, int, bool]]


def _located(
    segments: Sequence[Segment], device: torch.device
) -> tuple[tuple[Span, ...], list[torch.Tensor], list[torch.Tensor]]:
    """The spans, the gradients' bases and the destinations' bases."""
    for segment in segments:
        _check_segment(segment, device)
    gradients = _bases([segment.gradient for segment in segments])
    destinations = _bases([segment.destination for segment in segments])
    spans = tuple(
        Span(
            gradient_base=gradient_base,
            destination_base=destination_base,
            gradient=gradient,
            destination=destination,
            elements=segment.gradient.numel(),
            vector=VECTOR_BYTES // segment.gradient.element_size() if at_16 and destination_at_16 else 1,
            turned=segment.first != segments[0].first,
        )
        for segment, (gradient_base, gradient, at_16), (destination_base, destination, destination_at_16) in zip(
            segments, gradients.of, destinations.of, strict=True
        )
    )
    return spans, gradients.memories, destinations.memories


def _bases(tensors: Sequence[torch.Tensor]) -> _Bases:
    """One base for the tensors of one memory and dtype: from the first of them on, back to a multiple of 16 bytes.

    So a bucket has the same offsets wherever it lies: in any slot of a ring, in memory that is allocated anew.
    """
    keys = [(tensor.untyped_storage().data_ptr(), tensor.dtype) for tensor in tensors]
    lowest = dict[tuple[int, torch.dtype], torch.Tensor]()
    for key, tensor in zip(keys, tensors, strict=True):
        if key not in lowest or tensor.storage_offset() < lowest[key].storage_offset():
            lowest[key] = tensor
    begins = dict[tuple[int, torch.dtype], tuple[int, int, bool]]()
    memories = list[torch.Tensor]()
    for key, tensor in lowest.items():
        begin = int(tensor.storage_offset()) - tensor.data_ptr() % VECTOR_BYTES // tensor.element_size()
        at_16 = begin >= 0
        begin = max(begin, 0)
        begins[key] = (len(memories), begin, at_16)
        elements = tensor.untyped_storage().nbytes() // tensor.element_size() - begin
        memories.append(tensor.as_strided((elements,), (1,), begin))
    of = list[tuple[int, int, bool]]()
    for key, tensor in zip(keys, tensors, strict=True):
        number, begin, at_16 = begins[key]
        of.append((number, int(tensor.storage_offset()) - begin, at_16))
    return _Bases(memories, of)


def _check_segment(segment: Segment, device: torch.device) -> None:
    destination, gradient = segment.destination, segment.gradient
    if destination.shape != gradient.shape:
        raise ValueError(
            f"a master gradient of shape {tuple(destination.shape)} cannot take a gradient of shape "
            f"{tuple(gradient.shape)}"
        )
    if gradient.dim() != 1 or not (gradient.is_contiguous() and destination.is_contiguous()):
        raise ValueError("the kernels take segments of one dimension whose elements lie one behind the other")
    if gradient.dtype not in _GRADIENTS or destination.dtype is not torch.float32:
        raise ValueError(
            f"the kernels add bfloat16, float16 and float32 to float32, not {gradient.dtype} to {destination.dtype}"
        )
    if gradient.device != device or destination.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"the kernels of {device} add gradients that are there to destinations there or pinned on the host, "
            f"not gradients on {gradient.device} to destinations on {destination.device}"
        )


def _check_squares(squares: torch.Tensor | None, parts: int) -> None:
    if squares is None:
        return
    if squares.dtype is not torch.float64 or squares.shape != (parts,) or not squares.is_contiguous():
        raise ValueError(
            f"these segments give {parts} sums of squares, float64, one behind the other; their place is "
            f"{squares.dtype} of shape {tuple(squares.shape)}"
        )


def _multiprocessors(device: torch.device) -> int:
    # Without a GPU there is only Triton's interpreter, which runs programs one after the other.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
