"""The modules that fixes look at -> the fixes that look at them. tests/engine keeps this equal to the fixes' own data.

Packages come last: no fix looks at them, but the summary waits until the whole package is imported.
A table, so that the finder need not import a single fix to know which imports concern it.
"""

TARGETS = {
    "accelerate.data_loader": ("transformers.window_mean",),
    "deepspeed.runtime.bf16_optimizer": ("deepspeed.bf16_boundary",),
    "deepspeed.runtime.engine": (
        "deepspeed.offload_accumulation",
        "deepspeed.partition_accumulation",
        "deepspeed.bf16_boundary",
        "deepspeed.backward_division",
    ),
    "deepspeed.runtime.utils": ("deepspeed.backward_division",),
    "deepspeed.runtime.zero.stage3": ("deepspeed.stage3_accumulation", "deepspeed.known_races"),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "deepspeed.offload_accumulation",
        "deepspeed.partition_accumulation",
        "deepspeed.accumulator_reduction",
        "deepspeed.stage1_overlap",
        "deepspeed.known_races",
    ),
    "llamafactory.train.pt.trainer": ("llamafactory.window_mean",),
    "llamafactory.train.sft.trainer": ("llamafactory.window_mean",),
    "llamafactory.train.trainer_utils": ("llamafactory.window_mean",),
    "llamafactory.v1.core.base_trainer": ("llamafactory.v1_division",),
    "llamafactory.v1.plugins.trainer_plugins.distributed.deepspeed": ("llamafactory.v1_division",),
    "openrlhf.models.loss": (
        "openrlhf.sft_loss",
        "openrlhf.sft_accumulated_loss",
        "openrlhf.sft_windows",
    ),
    "openrlhf.trainer.sft_trainer": (
        "openrlhf.sft_loss",
        "openrlhf.sft_accumulated_loss",
        "openrlhf.sft_windows",
        "openrlhf.early_sft_loss",
    ),
    "openrlhf.utils.deepspeed.deepspeed": (
        "openrlhf.sft_loss",
        "openrlhf.sft_accumulated_loss",
        "openrlhf.sft_windows",
    ),
    "accelerate.accelerator": ("transformers.windows",),
    "accelerate.state": ("accelerate.partial_window",),
    "accelerate.utils.deepspeed": ("accelerate.partial_window",),
    "torchao.optim.cpu_offload": ("torchao.offloaded_gradients",),
    "torchao.prototype.low_bit_optim.cpu_offload": ("torchao.prototype_offloaded_gradients",),
    "transformers.trainer": (
        "llamafactory.window_mean",
        "transformers.accelerator_division",
        "transformers.label_smoothing",
        "transformers.window_mean",
        "transformers.windows",
    ),
    "transformers.trainer_pt_utils": (
        "transformers.label_smoothing",
        "transformers.window_mean",
        "trl.label_smoothing",
    ),
    "trl.trainer.sft_trainer": ("trl.label_smoothing",),
    "accelerate": (),
    "deepspeed": (),
    "llamafactory": (),
    "openrlhf": (),
    "torchao": (),
    "transformers": (),
    "trl": (),
}
