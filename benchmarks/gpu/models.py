"""The models: lists of parameter shapes as Qwen2.5 has them, and a random Llama-style network in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional


class Sizes(NamedTuple):
    """A Llama-style model. biases: of query, key and value, as Qwen2.5 has them. tied: the head is the embedding."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    key_heads: int
    words: int
    tied: bool
    biases: bool


MODELS = {
    "0.5B": Sizes(896, 4864, 24, 14, 2, 151_936, True, True),  # Qwen2.5-0.5B
    "1.5B": Sizes(1536, 8960, 28, 12, 2, 151_936, True, True),  # Qwen2.5-1.5B
    "7B": Sizes(3584, 18_944, 28, 28, 4, 152_064, False, True),  # Qwen2.5-7B
    "tiny": Sizes(64, 176, 2, 4, 2, 512, True, True),
}


def shapes(sizes: Sizes) -> Iterator[tuple[int, ...]]:
    """Of all parameters, in the order in which the model registers them."""
    hidden, keys = sizes.hidden, sizes.hidden // sizes.heads * sizes.key_heads
    yield sizes.words, hidden
    for _ in range(sizes.blocks):
        for width in (hidden, keys, keys):
            yield width, hidden
            if sizes.biases:
                yield (width,)
        yield hidden, hidden
        yield sizes.inner, hidden
        yield sizes.inner, hidden
        yield hidden, sizes.inner
        yield (hidden,)
        yield (hidden,)
    yield (hidden,)
    if not sizes.tied:
        yield sizes.words, hidden


def elements(sizes: Sizes) -> list[int]:
    return [math.prod(shape) for shape in shapes(sizes)]


def share(counts: Sequence[int], parts: int) -> list[int]:
    """What the first of `parts` ranks owns: the first that many elements, the last parameter cut at the edge."""
    room, owned = sum(counts) // parts, list[int]()
    for count in counts:
        if room <= 0:
            break
        owned.append(min(count, room))
        room -= count
    return owned


def buckets(counts: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the parameters, bucket by bucket, as a backward pass fills them: the last parameter first.

    A parameter that is larger than a bucket is one by itself.
    """
    made: list[list[int]] = [[]]
    filled = 0
    for number in reversed(range(len(counts))):
        if made[-1] and filled + counts[number] > size:
            made.append([])
            filled = 0
        made[-1].append(number)
        filled += counts[number]
    return made


class Block(torch.nn.Module):
    """Attention with rotary positions and grouped keys, and a gated inner layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.key_heads, hidden = sizes.heads, sizes.key_heads, sizes.hidden
        self.width = hidden // sizes.heads
        keys = self.width * sizes.key_heads
        self.q = torch.nn.Linear(hidden, hidden, bias=sizes.biases)
        self.k = torch.nn.Linear(hidden, keys, bias=sizes.biases)
        self.v = torch.nn.Linear(hidden, keys, bias=sizes.biases)
        self.o = torch.nn.Linear(hidden, hidden, bias=False)
        self.gate = torch.nn.Linear(hidden, sizes.inner, bias=False)
        self.up = torch.nn.Linear(hidden, sizes.inner, bias=False)
        self.down = torch.nn.Linear(sizes.inner, hidden, bias=False)
        self.norm = torch.nn.RMSNorm(hidden, eps=1e-6)
        self.inner_norm = torch.nn.RMSNorm(hidden, eps=1e-6)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        normed = self.norm(x)
        q, k, v = (
            layer(normed).view(batch, length, heads, self.width).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.key_heads), (self.v, self.key_heads))
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        k, v = (one.repeat_interleave(self.heads // self.key_heads, dim=1) for one in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, length, hidden))
        normed = self.inner_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Llama(torch.nn.Module):
    """Random weights, drawn with a fixed seed on the host. Gives the mean loss of predicting the next word."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(sizes.words, sizes.hidden)
        self.blocks = torch.nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))
        self.norm = torch.nn.RMSNorm(sizes.hidden, eps=1e-6)
        self.head = None if sizes.tied else torch.nn.Linear(sizes.hidden, sizes.words, bias=False)
        self.width = sizes.hidden // sizes.heads
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02, generator=generator)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        steps = torch.arange(0, self.width, 2, device=words.device, dtype=torch.float32) / self.width
        angles = torch.outer(torch.arange(words.shape[1], device=words.device, dtype=torch.float32), 10_000.0**-steps)
        cos, sin = (torch.cat((one, one), dim=-1).to(x.dtype) for one in (angles.cos(), angles.sin()))
        for block in self.blocks:
            x = block(x, cos, sin)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = functional.linear(self.norm(x), weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), words[:, 1:].flatten())
