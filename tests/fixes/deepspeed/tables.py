"""What the tests of this folder run: tables of configurations by name, each table in one child process.

Where a configuration names no release, its test does. Unless it says otherwise a configuration is ZeRO-2 with CPU
offload, fp32, four micro-batches per window and three windows of different data.
"""

from __future__ import annotations

from typing import Any

Table = dict[str, dict[str, Any]]

SMALL: dict[str, Any] = {"bucket": 500}  # elements; one of the model's parameters has 1369, more than such a bucket
SKIP: dict[str, Any] = {"dtype": "fp16", "loss_scale": 0, "overflow_window": 1, "windows": 4}
NVME: dict[str, Any] = {"extra": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}

LOSING: Table = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "fp16 with a static loss scale": {"dtype": "fp16"},
    "fp16 with an overflow skip": SKIP,
    "torch autocast": {"dtype": "autocast"},
    "bf16 with fp32 accumulation asked for": {"dtype": "bf16", "extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "no overlap": {"overlap": False},
    "overlap": {"overlap": True},
    "small buckets": {"overlap": False, **SMALL},
    "small buckets and overlap": {"overlap": True, **SMALL},
    "frozen parameter": {"frozen": True},
    "two parameter groups": {"groups": 2},
    "clipping": {"clip": 0.1},
    "clipping, fp16": {"clip": 0.1, "dtype": "fp16"},
    "reentrant checkpointing": {"checkpointing": "reentrant"},
    "non-reentrant checkpointing": {"checkpointing": "nonreentrant"},
    "reentrant checkpointing, small buckets": {"checkpointing": "reentrant", **SMALL},
    "three micro-batches": {"ga": 3},
    "eight micro-batches": {"ga": 8},
    "eight micro-batches, reentrant checkpointing": {"ga": 8, "checkpointing": "reentrant"},
    "step only at the boundary": {"driver": "boundary"},
    "engine of two driven by hand to four": {"driver": "accelerate", "engine_steps": 2},
    "nvme offload, which stage 2 treats as cpu": NVME,
    "round_robin_gradients": {"round_robin": True},
}

# An engine with one accumulation step, and four backward() per step: TF-0003.
LONE: Table = {
    "boundary set by hand": {"driver": "accelerate"},
    "boundary set by hand, bf16": {"driver": "accelerate", "dtype": "bf16"},
    "boundary set by hand, clipping": {"driver": "accelerate", "clip": 0.1},
}

CONDITIONAL: Table = {
    f"side branch in micro-batches {mask}": {"mask": mask} for mask in ("0111", "1110", "1000", "0001", "0110")
}

HANDED_OVER: Table = {
    f"{steps} micro-batch(es), {dtype}, checkpointing: {checkpointing or 'none'}": {
        "ga": steps,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "clip": 0.5,
    }
    for steps in (1, 2)
    for dtype in ("fp32", "bf16")
    for checkpointing in ("", "reentrant", "nonreentrant")
} | {
    "stage 1 with offload, fp32": {"stage": 1},
    "stage 1 with offload, bf16": {"stage": 1, "dtype": "bf16"},
    "stage 1 with offload, fp16": {"stage": 1, "dtype": "fp16"},
    "stage 1 with offload, eight micro-batches, small buckets": {"stage": 1, "ga": 8, **SMALL},
    "stage 2 without offload": {"offload": False},
    "stage 2 without offload, bf16": {"offload": False, "dtype": "bf16"},
    "two micro-batches, fp16 with an overflow skip": {"ga": 2, **SKIP},
    "two micro-batches, step only at the boundary": {"ga": 2, "driver": "boundary"},
}

# Every backward() is a boundary of its own: DeepSpeed keeps the last, which a loop that skips a step may want.
BARE: Table = {"boundary never set": {"driver": "bare"}}

ZERO_GRAD: Table = {
    f"{call}() in mid-window, {'with' if offload else 'without'} offload": {
        "scenario": "zero_grad",
        "call": call,
        "offload": offload,
    }
    for call in ("engine.zero_grad", "optimizer.zero_grad")
    for offload in (True, False)
}

UNUSED = "side branch unused in a whole window"
UNUSED_PARTITION = "all of a rank's partition unused in a whole window"  # the second rank's: side makes 10037 of 13444
EVENTS: Table = {
    "resume": {"scenario": "resume"},
    "resume, bf16": {"scenario": "resume", "dtype": "bf16"},
    "load in mid-window": {"scenario": "load_in_mid_window", "driver": "boundary"},
    "load in mid-window, bf16": {"scenario": "load_in_mid_window", "driver": "boundary", "dtype": "bf16"},
    "several engines": {"scenario": "several_engines"},
    "destroy": {"scenario": "destroy"},
    "destroy, bf16": {"scenario": "destroy", "dtype": "bf16"},
    "safe gradients": {"scenario": "safe_gradients"},
    "safe gradients, two groups": {"scenario": "safe_gradients", "groups": 2},
    UNUSED: {"scenario": "unused_window", "mask": "1111"},
    UNUSED_PARTITION: {"scenario": "unused_window", "mask": "1111", "side": 200},
    "calls": {"scenario": "calls"},
    "calls, small buckets": {"scenario": "calls", **SMALL},
}
LOAD_WITHOUT_STATES: Table = {
    "load in mid-window, without the optimizer's states": {
        "scenario": "load_in_mid_window",
        "driver": "boundary",
        "optimizer_states": False,
    }
}
REVERT: Table = {"revert": {"scenario": "revert", "windows": 5}}

TWO_RANKS: Table = {
    "fp32, a parameter straddling the partitions": {},  # the second matrix lies across the middle of 3407 elements
    "bf16": {"dtype": "bf16"},
    "torch autocast": {"dtype": "autocast"},
    "fp16 with an overflow skip": SKIP,
    "small buckets": {"overlap": False, **SMALL},
    "small buckets and overlap": {"overlap": True, **SMALL},
    "frozen parameter": {"frozen": True},
    "two parameter groups and clipping": {"groups": 2, "clip": 0.1},
    "reentrant checkpointing": {"checkpointing": "reentrant"},
    "step only at the boundary": {"driver": "boundary"},
    "round_robin_gradients": {"round_robin": True},
}
TWO_RANKS_LONE: Table = {"boundary set by hand": {"driver": "accelerate"}}
TWO_RANKS_HANDED_OVER: Table = {
    "two micro-batches, fp32": {"ga": 2},
    "two micro-batches, bf16": {"ga": 2, "dtype": "bf16"},
    "stage 1 with offload": {"stage": 1},
}
TWO_RANKS_EVENTS: Table = {
    name: EVENTS[name]
    for name in ("resume, bf16", "load in mid-window", "destroy", "safe gradients", UNUSED, UNUSED_PARTITION)
}

# What one child runs. The scenarios that leave something behind come last.
ONE_RANK = {**LOSING, **LONE, **CONDITIONAL, **HANDED_OVER, **BARE, **ZERO_GRAD, **EVENTS, **LOAD_WITHOUT_STATES}
ONE_RANK_WITH_TRAINFIX = {**ONE_RANK, **REVERT}
BOTH_RANKS = {**TWO_RANKS, **TWO_RANKS_LONE, **TWO_RANKS_HANDED_OVER, **TWO_RANKS_EVENTS}
EARLY_RELEASE = {**LONE, **ZERO_GRAD}
HEALTHY_RELEASE = {**ZERO_GRAD, **LOAD_WITHOUT_STATES, "untouched": {"scenario": "untouched"}}
LATE = {"late import": {"scenario": "late_import"}}
LATE_LONE = {"late import": {"scenario": "late_import", "driver": "accelerate"}}

# Master weights and gradients in the model's own type, which only DeepSpeed's compiled optimizer takes.
MASTERS: dict[str, dict[str, Any]] = {
    dtype: {"dtype": dtype, "cpu_adam": True, "extra": {dtype: {f"{dtype}_master_weights_and_grads": True}}}
    for dtype in ("fp16", "bf16")
}
MASTERS_LOSING: dict[str, dict[str, Any]] = {
    "four micro-batches": {},
    "eight micro-batches": {"ga": 8, **SMALL},
    "clipping": {"clip": 0.1},
    "engine of two driven by hand to four": {"driver": "accelerate", "engine_steps": 2},
    "engine of one driven by hand to four": {"driver": "accelerate"},
}
MASTERS_HANDED_OVER: dict[str, dict[str, Any]] = {"two micro-batches": {"ga": 2}}


def low_precision_masters(*dtypes: str) -> Table:
    """Everything above with masters in each of these types; names begin with the type."""
    ways = {**MASTERS_LOSING, **MASTERS_HANDED_OVER}
    return {f"{dtype}, {name}": {**MASTERS[dtype], **way} for dtype in dtypes for name, way in ways.items()}
