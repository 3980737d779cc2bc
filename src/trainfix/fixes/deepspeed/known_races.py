"""Known, and not repaired: one warning when a run reaches TF-0010, TF-0011 or TF-0012, and never a stop.

TF-0010: `average_tensor` divides the gradients of experts by the size of their own data-parallel group; deepspeed#6546
(0.15.4). TF-0011: ZeRO-3 waits on the default stream for gradients that torch 2.10 computes on another; #7898 (0.18.8).
TF-0012: ZeRO-1/2 with overlap_comm reuses memory whose reduction still runs; #7371 (0.17.5) and #7965 (0.19.0).
The last two are races, which we have not seen fail; all three need hardware or models that we do not train.

Delete this file when no supported framework pins a DeepSpeed older than 0.19.0, or what it warns of is repaired.
"""

from __future__ import annotations

import sys
from typing import Any

from trainfix.engine.contract import Fix, Guard


def _streams_race() -> bool:
    """Whether work on this device runs on streams, which must be told to wait for each other."""
    from deepspeed.accelerator import get_accelerator

    return not get_accelerator().resolves_data_dependency()


def _between(package: str, first: str, last: str) -> bool:
    from packaging.version import Version

    return Version(first) <= Version(str(sys.modules[package].__version__)) <= Version(last)


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.bit16_groups for parameter in group]


def _experts_are_scaled(optimizer: Any) -> str | None:
    """TF-0010: experts are shared out over ranks, and reduced on the way that divides by the wrong size."""
    from torch.distributed import get_world_size

    if not (optimizer.has_moe_layers and optimizer.contiguous_gradients and optimizer.reduce_scatter):
        return None
    whole = get_world_size(group=optimizer.dp_process_group)
    sizes = {get_world_size(group=group) for group in optimizer.real_dp_process_group}
    if min(sizes) >= whole:
        return None
    return f"experts whose data-parallel group has {min(sizes)} of {whole} ranks"


def _waits_for_the_default_stream(optimizer: Any) -> str | None:
    """TF-0011: where it is reached no object shows which stream computes a gradient."""
    if not _streams_race() or not _between("torch", "2.10", "9999"):
        return None
    return f"ZeRO stage 3 on a device with streams, torch {sys.modules['torch'].__version__}"


def _memory_is_reused(optimizer: Any) -> str | None:
    """TF-0012: a gradient that is reduced by itself, or, while `IPGBucket.clear` reset the index, any second bucket."""
    if not optimizer.overlap_comm or not _streams_race():
        return None
    sizes = [parameter.numel() for parameter in _parameters(optimizer)]
    index_is_reset = _between("deepspeed", "0.17.2", "0.17.4")
    elements = sum(sizes) if index_is_reset else max(sizes, default=0)
    if elements <= optimizer.reduce_bucket_size:
        return None
    what = "a model" if index_is_reset else "a parameter"
    return f"overlap_comm and {what} of {elements} elements, reduce_bucket_size = {optimizer.reduce_bucket_size:g}"


FIX = Fix(
    name="deepspeed.known_races",
    package="deepspeed",
    advisories=("TF-0010", "TF-0011", "TF-0012"),
    requires={"deepspeed": ">=0.14.0"},
    targets=(),
    relies_on=(),
    guards=(
        Guard(
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.__init__",
            {"TF-0010": _experts_are_scaled, "TF-0012": _memory_is_reused},
        ),
        Guard(
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.__init__",
            {"TF-0011": _waits_for_the_default_stream},
        ),
    ),
    build=None,
    repairs=lambda built: False,
    group=lambda built: None,
    limits="trainfix warns of it and does not repair it",
)
