"""The modules that fixes look at -> the fixes that look at them. tests/engine keeps this equal to the fixes' own data.

Packages come last: no fix looks at them, but the summary waits until the whole package is imported.
A table, so that the finder need not import a single fix to know which imports concern it.
"""

TARGETS = {
    "deepspeed.runtime.bf16_optimizer": ("deepspeed.bf16_boundary",),
    "deepspeed.runtime.engine": (
        "deepspeed.offload_accumulation",
        "deepspeed.partition_accumulation",
        "deepspeed.bf16_boundary",
        "deepspeed.unscaled_backward",
    ),
    "deepspeed.runtime.zero.stage3": ("deepspeed.stage3_accumulation", "deepspeed.known_races"),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "deepspeed.offload_accumulation",
        "deepspeed.partition_accumulation",
        "deepspeed.accumulator_reduction",
        "deepspeed.stage1_overlap",
        "deepspeed.known_races",
    ),
    "deepspeed": (),
}
