"""Which adapter reads a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from trainfix.ledger.consumers import Consumer, Unreadable

_FRAMEWORKS = (
    ("deepspeed", "DeepSpeedEngine"),
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)


def roots(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost modules of a framework in what the loop calls, where they hold all that is trained; else itself."""
    found = list(_outermost(model))
    held = {id(one) for part in found for one in part.parameters()}
    trained = [one for one in model.parameters() if one.requires_grad]
    return found if found and all(id(one) in held for one in trained) else [model]


def _outermost(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    if any(_is(model, *kind) for kind in _FRAMEWORKS):
        yield model
        return
    for child in model.children():
        yield from _outermost(child)


def of(model: torch.nn.Module) -> Consumer:
    """The adapter for this outermost module. Raises Unreadable."""
    try:
        return _of(model)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        # Insides of another release than those that we know.
        raise Unreadable(
            f"{type(model).__name__} is not held as we know it ({type(error).__name__}: {error})"
        ) from error


def _of(model: Any) -> Consumer:
    if _is(model, "deepspeed", "DeepSpeedEngine"):
        from trainfix.ledger.consumers.deepspeed import DeepSpeed

        if _is(model, "deepspeed.runtime.pipe.engine", "PipelineEngine"):
            raise Unreadable("pipeline parallelism: a rank sees only its own stage")
        return DeepSpeed(model)
    if any(_is(one, "torch.distributed.fsdp", "FSDPModule") for one in model.modules()):
        from trainfix.ledger.consumers.fully_shard import FullyShard

        return FullyShard(model)
    inside = getattr(model, "_orig_mod", model)  # torch.compile
    if _is(inside, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        from trainfix.ledger.consumers.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(inside)
    if any(_is(one, "torch.distributed.fsdp", "FullyShardedDataParallel") for one in model.modules()):
        raise Unreadable("FullyShardedDataParallel somewhere inside the model, not around it")
    if any(hasattr(one, "placements") for one in model.parameters()):
        raise Unreadable("tensor parallelism: parameters are spread over ranks")
    from trainfix.ledger.consumers import torchao
    from trainfix.ledger.consumers.plain import Plain

    offload = torchao.of(model)
    return Plain(model) if offload is None else torchao.Offloaded(model, offload)


def _is(one: object, module: str, name: str) -> bool:
    """Whether it is of a class of a package that the run imported; nothing is imported for the question."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(one, kind)
