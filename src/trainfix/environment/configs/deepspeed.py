"""DeepSpeed's own JSON config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainfix.environment.configs.documents import Document
from trainfix.environment.configs.draft import Draft

KIND = "deepspeed"

# What DeepSpeed reads at the top of its config (``runtime/config.py`` and the sections' own modules, 0.14.0 to 0.19.8).
TOP = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    disable_allgather dump_state eigenvalue elasticity flops_profiler fp16 gradient_accumulation_steps
    gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine managed_gradient_accumulation
    memory_breakdown nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training
    scheduler seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print
    tensor_parallel tensorboard torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wandb wall_clock_breakdown zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)


def recognises(document: Document) -> bool:
    """A JSON object with a key of DeepSpeed's, or an empty one."""
    if not document.text.lstrip().startswith("{") or document.path.lower().endswith((".yaml", ".yml")):
        return False
    return not document.content or bool(TOP & document.content.keys())


def read(document: Document) -> tuple[Draft, ...]:
    """The draft of a DeepSpeed config."""
    draft = Draft(document, KIND, "deepspeed")
    draft.put("deepspeed", True, text=f"{document.path} is a DeepSpeed config")
    for key, value in flat(document.content):
        draft.put(key, value)
    return (draft,)


def inside(document: Document, section: Mapping[str, object], *written: str) -> Draft:
    """The draft of a DeepSpeed config that stands in another program's document, at the key path `written`."""
    draft = Draft(document, KIND, "deepspeed")
    draft.put("deepspeed", True, *written, text=f"{'.'.join(written)} is a DeepSpeed config ({document.path})")
    for key, value in flat(section):
        draft.put(key, value, *written, *key.split("."))
    return draft


def flat(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Flat dotted keys. An empty section stays as a value, so that its presence is seen."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
