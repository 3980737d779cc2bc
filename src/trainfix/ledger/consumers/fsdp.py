"""FSDP1: `torch.distributed.fsdp.FullyShardedDataParallel`, with and without CPU offload and use_orig_params.

Gradients arrive at a flat parameter that holds those of a module one after the other; each rank consumes a piece of it,
as the flat parameter's own gradient or as the original parameters'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from trainfix.ledger.capture import Leaf
from trainfix.ledger.consumers import Home, itself, stepped


class _Piece(NamedTuple):
    """One original parameter: its flat one, where it begins in that, its size, and its entry in the flat one's tables.

    of: the original parameter where the optimizer steps those, else None.
    """

    flat: Any
    begin: int
    size: int
    number: int
    of: torch.Tensor | None


class FullyShardedDataParallel:
    """The outermost FullyShardedDataParallel module."""

    owner = staticmethod(itself)

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pieces = {}
        for name, wrapped in model.named_modules():
            handle = wrapped._handle if isinstance(wrapped, type(model)) else None
            if handle is not None and handle.flat_param.requires_grad:
                plain = f"{name}.".replace("_fsdp_wrapped_module.", "") if name else ""
                self._pieces.update(_pieces(plain, handle.flat_param))

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: piece.size for name, piece in self._pieces.items()}

    @property
    def group(self) -> object:
        sharded = self._model.process_group
        return sharded if sharded.size() == torch.distributed.get_world_size() else None  # hybrid: all ranks

    def leaves(self) -> Mapping[str, Leaf]:
        return {name: Leaf(piece.flat, piece.begin) for name, piece in self._pieces.items()}

    def homes(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Home]:
        own = stepped(optimizer)
        pieces = self._pieces.items()
        return {name: _home(one) for name, one in pieces if id(one.flat if one.of is None else one.of) in own}


def _pieces(prefix: str, flat: Any) -> dict[str, _Piece]:
    pieces, begin, number = {}, 0, 0
    for size, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            of = None if flat._params is None else flat._params[number]
            if of is None or of.requires_grad:
                own = str(flat._fqns[number]).replace("_fsdp_wrapped_module.", "")
                pieces[prefix + own] = _Piece(flat, begin, size, number, of)
            number += 1
        begin += size
    return pieces


def _home(piece: _Piece) -> Home:
    info = piece.flat._shard_param_infos[piece.number]
    holder = piece.flat if piece.of is None else piece.of
    if not info.in_shard:
        return Home(holder, 0, 0, 0)
    begin, end = info.intra_param_start_idx, info.intra_param_end_idx + 1
    return Home(holder, (info.offset_in_shard if piece.of is None else 0) - begin, begin, end)
