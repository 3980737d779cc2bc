"""The modules that fixes look at -> the fixes that look at them. tests/engine keeps this equal to the fixes' own data.

A table, so that the finder need not import a single fix to know which imports concern it.
"""

TARGETS = {
    "deepspeed.runtime.engine": ("deepspeed.offload_accumulation",),
    "deepspeed.runtime.zero.stage_1_and_2": ("deepspeed.offload_accumulation",),
}
