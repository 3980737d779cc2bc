"""What is run on every release: configurations, and which errors each of them reaches where the release has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FP32_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


@dataclass(frozen=True)
class Case:
    """One configuration of `tests.support.experiment`, as `tests.fixes.deepspeed.scenarios` runs it.

    reaches: the advisories that it reaches.
    looks_at: what a wrong run shows. ``error``: a gradient that is not the sum. ``earlier``: gradients of earlier
    windows; such a run may be short of micro-batches without an advisory saying so. ``rounding``: an inexact sum.
    exact: a repaired run has the sum to float32; else, in 16 bits, no more than the rounding of 16 bits.
    since: the first release that is run with it.
    tiers: it is run again on each other way of offloaded gradients, which must give the same bits.
    """

    name: str
    configuration: Mapping[str, Any]
    reaches: tuple[str, ...] = ()
    ranks: int = 1
    looks_at: str = "error"
    exact: bool = True
    since: str = "0.14.0"
    tiers: bool = False


# Besides torch, which `auto` takes where the gradients are on the host.
TIERS = ("host-add", "ring", "resident")


def _dense(stage: int, dtype: str, ga: int) -> Case:
    reaches = ("TF-0001",) if stage == 2 and ga > 2 else ()
    tiers = stage == 2 and (dtype, ga) in (("bf16", 8), ("fp32", 3))
    return Case(f"Z{stage} {dtype} GA{ga}", {"stage": stage, "dtype": dtype, "ga": ga}, reaches, tiers=tiers)


def _by_hand(stage: int, dtype: str) -> Case:
    configuration = {"stage": stage, "dtype": dtype, "driver": "accelerate"}
    reaches = ("TF-0003",) if stage == 2 else ()
    return Case(f"Z{stage} {dtype} 4 by hand", configuration, reaches, tiers=bool(reaches) and dtype == "bf16")


_OFFLOAD = [
    *(_dense(stage, dtype, ga) for stage in (1, 2) for dtype in ("bf16", "fp32") for ga in (1, 2, 3, 8)),
    *(_by_hand(stage, dtype) for stage in (1, 2) for dtype in ("bf16", "fp32")),
    Case("Z2 branch in 0111", {"mask": "0111"}, ("TF-0001", "TF-0004"), tiers=True),
    Case("Z2 branch in 1110", {"mask": "1110"}, ("TF-0001", "TF-0004")),
    Case("Z2 GA2 branch in 10", {"ga": 2, "mask": "10"}, ("TF-0004",)),
    Case("Z2 GA1 branch in every other window", {"ga": 1, "mask": "10"}, ("TF-0004",)),
    Case("Z1 GA2 branch in every other window", {"stage": 1, "ga": 2, "mask": "1100"}, ("TF-0004",)),
    Case(
        "Z2 bf16 GA2 float32 sums",
        {"dtype": "bf16", "ga": 2, "ask_for": ["TF-0009"]},
        ("TF-0009",),
        looks_at="rounding",
        tiers=True,
    ),
    *(
        Case(f"Z{stage} 4 bare", {"stage": stage, "driver": "bare"}, ("TF-0013",), looks_at="earlier")
        for stage in (1, 2)
    ),
]
_OVERLAP_1: dict[str, Any] = {"stage": 1, "overlap": True, "mask": "1110"}
_COMPOSED: dict[str, Any] = {"scenario": "composed", "stage": 1, "offload": False, "ga": 3}
_DEVICE = [
    *(
        Case(f"Z{stage} device {dtype} GA4", {"stage": stage, "offload": False, "dtype": dtype}, reaches, exact=False)
        for stage, reaches in ((1, ()), (2, ("TF-0002",)))
        for dtype in ("bf16", "fp32")
    ),
    Case("Z1 overlap branch in 1110", _OVERLAP_1, ("TF-0042",)),
    Case("Z2 device 4 by hand", {"offload": False, "driver": "accelerate"}, ("TF-0002",)),
    Case("Z2 device branch in 0110", {"offload": False, "mask": "0110"}, ("TF-0002",)),
    Case("Z1 unscaled", {"stage": 1, "offload": False, "backward": "unscaled"}, ("TF-0008",)),
    Case("Z2 GA2 unscaled", {"ga": 2, "backward": "unscaled"}, ("TF-0008",)),
    Case("Z1 GA3 loss and logits", {**_COMPOSED, "call": "loss and logits"}, ("TF-0032",)),
    Case("Z1 GA3 engine.module", {**_COMPOSED, "call": "a forward of engine.module"}, ("TF-0032",)),
    Case("Z1 GA3 two heads", {**_COMPOSED, "call": "two heads"}),
]
_STAGE_3 = [
    *(
        Case(f"Z3 {where} GA4", {"stage": 3, "offload": offload})
        for where, offload in (("offload", True), ("device", False))
    ),
    Case("Z3 offload branch in 0110", {"stage": 3, "mask": "0110"}, ("TF-0005",)),
    Case("Z3 device branch in 0111", {"stage": 3, "offload": False, "mask": "0111"}, ("TF-0005",)),
    Case("Z3 GA1 branch in every other window", {"stage": 3, "ga": 1, "mask": "10"}, ("TF-0005",)),
]
_TWO_RANKS = [
    Case("Z1 GA3", {"stage": 1, "ga": 3}),
    Case("Z2 GA3", {"ga": 3}, ("TF-0001",)),
    Case("Z2 4 by hand", {"driver": "accelerate"}, ("TF-0003",)),
    Case("Z2 branch in 0110", {"mask": "0110"}, ("TF-0001", "TF-0004"), tiers=True),
    Case("Z2 4 bare", {"driver": "bare"}, ("TF-0013",), looks_at="earlier"),
    Case("Z2 device GA4", {"offload": False}, ("TF-0002",)),
    Case("Z1 device overlap branch in 1110", {**_OVERLAP_1, "offload": False}, ("TF-0042",), exact=False),
    Case("Z3 offload branch in 0110", {"stage": 3, "mask": "0110"}, ("TF-0005",)),
    Case(
        "Z1 bf16 float32 sums GA3",
        {"stage": 1, "dtype": "bf16", "ga": 3, "extra": _FP32_SUMS},
        ("TF-0006",),
        exact=False,  # it is averaged in bf16
    ),
    Case(
        "BF16_Optimizer GA3",
        {"stage": 1, "offload": False, "dtype": "bf16", "ga": 3, "extra": _FP32_SUMS},
        ("TF-0007",),
        since="0.18.5",  # 0.17.6 to 0.18.4 build none
    ),
    Case("Z1 GA3 loss and logits", {**_COMPOSED, "call": "loss and logits"}, ("TF-0032",)),
]

CASES = tuple(
    Case(**{**vars(case), "ranks": ranks, "name": case.name + (", two ranks" if ranks == 2 else "")})
    for ranks, cases in ((1, [*_OFFLOAD, *_DEVICE, *_STAGE_3]), (2, _TWO_RANKS))
    for case in cases
)
WINDOWS = 3
