"""Rows with padding [rows, length, ...] <-> their tokens in one line [tokens, ...]."""

import torch
from einops import rearrange

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def index_first_axis(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return tokens.index_select(0, indices)


def unpad_input(
    padded: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """(the tokens where `mask` is set, their places in the flattened rows, where each row begins, longest, lengths)."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    indices = mask.reshape(-1).nonzero().reshape(-1)
    begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return index_first_axis(padded.flatten(0, 1), indices), indices, begins, int(lengths.max()), lengths


def pad_input(tokens: torch.Tensor, indices: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """The reverse: zeros where there is no token."""
    padded = tokens.new_zeros(rows * length, *tokens.shape[1:])
    return padded.index_copy(0, indices, tokens).unflatten(0, (rows, length))
