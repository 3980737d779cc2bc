"""Whose loss does a trainer compute? Only a loss that is known here is rescaled; a user's own is left alone.

Known: `Trainer.compute_loss` as the release wrote it, or an override that only hands on to it (`HANDING_ON`), no
`compute_loss_func`, no label smoother but transformers' own, and a causal language model with transformers' own loss.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from trainfix.engine.replace import foreign, live_shape

_TRAINER = "transformers.trainer:Trainer"

# Overrides of `compute_loss` that hand on to Trainer's with the number of items and return its loss: -> their shapes.
HANDING_ON: Mapping[str, frozenset[str]] = {
    # 0.9.1, 0.9.3; 0.9.5 without use_asft_loss, which has a compute_loss_func. The other releases have none.
    "llamafactory.train.sft.trainer:CustomSeq2SeqTrainer": frozenset({"077d025e182e", "71360e0e723d", "c608e53a0cff"}),
    "llamafactory.train.pt.trainer:CustomTrainer": frozenset({"077d025e182e", "71360e0e723d"}),
    "trl.trainer.sft_trainer:SFTTrainer": frozenset(
        {
            "6bf1f9e6e406",  # 0.15.0; before, there is none
            "935f617f46cf",  # 0.15.1
            "e193a3a292b9",  # 0.15.2
            "ea80544a335f",  # 0.16.0
            "aac6d8d09183",  # 0.17.0
            "4905aa79a7fc",  # 0.18.0
            "46af3a1c217c",  # 0.22.0
            "85c51892670e",  # 0.23.0
            "2b6466721513",  # 0.23.1
            "591e571f35f4",  # 0.24.0
            "adfd634e3277",  # 0.25.0
            "e57e671b9545",  # 0.26.0
            "bd7c03e516a0",  # 0.27.0
            "e9e80e6cd91a",  # 0.29.0
            "66455fe1dd10",  # 1.3.0
            "9af8a3c31662",  # 1.4.0
            "abc32afa0fa9",  # 1.6.0
            "ba6e639bde7c",  # 1.7.0
            "2409c0f9a023",  # 1.13.0 to 1.14.2; from 1.15.0 on it computes the loss itself: see fixes/trl
        }
    ),
}

# Those that divide by the steps themselves where a model takes no count, with transformers 4.46: LLaMA-Factory 0.9.1.
_DIVIDES_ON_4_46 = frozenset({"077d025e182e"})

# Modules whose functions may stand for a model's `forward`: they compute the same loss. Liger-Kernel's do, in every
# release: the sum divided by the count where they take one, and else the mean.
FORWARDS = ("transformers.", "accelerate.", "torch.", "liger_kernel.transformers.model.")

# Functions that may stand for a causal language model's `loss_function`.
LOSS_FUNCTIONS = frozenset({"transformers.loss.loss_utils.ForCausalLMLoss"})

# Unsloth puts functions of its own in place of Trainer's and of models' (modules `unsloth.`, `unsloth_zoo.`,
# `unsloth_compiled_module_`) that compute the same loss; no user's own. What they undo of a repair, the engine finds.
UNSLOTH = "unsloth"


def own_loss(trainer: Any) -> str | None:
    """None if the loss that `trainer` computes is one that we know, else whose it is, in words."""
    return own_computation(trainer) or _own_model(plain_model(trainer))


def own_computation(trainer: Any) -> str | None:
    """The same, whatever the model: where the model's own loss is not asked for (label smoothing)."""
    return _own_compute_loss(trainer) or _own_function(trainer)


def _own_compute_loss(trainer: Any) -> str | None:
    if "compute_loss" in vars(trainer):
        return f"own loss: {_name(vars(trainer)['compute_loss'])}"
    for cls in type(trainer).__mro__:
        if "compute_loss" not in vars(cls):
            continue
        path = f"{cls.__module__}:{cls.__qualname__}"
        if path == _TRAINER:
            who = foreign(f"{path}.compute_loss")
            return None if who is None or who.startswith(UNSLOTH) else f"own loss: {who}"
        shape = live_shape(f"{path}.compute_loss")
        divides = shape in _DIVIDES_ON_4_46 and not getattr(trainer, "model_accepts_loss_kwargs", True)
        if divides or shape not in HANDING_ON.get(path, ()):
            return f"own loss: {_name(vars(cls)['compute_loss'])}"
    return f"own loss: {type(trainer).__qualname__} is not transformers' Trainer"


def _own_function(trainer: Any) -> str | None:
    function = getattr(trainer, "compute_loss_func", None)
    if function is not None:
        return f"own loss: compute_loss_func {_name(function)}"
    smoother = getattr(trainer, "label_smoother", None)
    own = type(smoother)
    if smoother is not None and (own.__module__, own.__name__) != ("transformers.trainer_pt_utils", "LabelSmoother"):
        return f"own loss: label smoother {_name(own)}"
    return None


def _own_model(model: Any) -> str | None:
    cls = type(model)
    if not _is_causal(model):
        return f"not a causal language model: {cls.__qualname__}"
    forward = vars(model).get("forward", cls.forward)
    if not str(getattr(forward, "__module__", "")).startswith((*FORWARDS, UNSLOTH)):
        return f"own loss: {_name(forward)}"
    function = getattr(model, "loss_function", None)  # since 4.46
    if function is not None and _name(function) not in LOSS_FUNCTIONS and not _name(function).startswith(UNSLOTH):
        return f"own loss: {_name(function)}"
    return None


def _is_causal(model: Any) -> bool:
    """Whether the class, or one that it derives from, is listed by transformers as a causal language model."""
    names: Any = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    listed = {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}
    return any(cls.__name__ in listed for cls in type(model).__mro__)


def plain_model(trainer: Any) -> Any:
    """The trainer's model without what DDP, DeepSpeed, torch.compile and PEFT put around it."""
    model = trainer.model
    while True:
        module = type(model).__module__
        if module.startswith("peft."):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif module.startswith(("torch.nn.parallel.", "torch.distributed.", "deepspeed.")) and hasattr(model, "module"):
            model = model.module
        else:
            return model


def _name(thing: Any) -> str:
    """``module.qualname`` of a function, method, class, or of a callable object's class."""
    named = thing if hasattr(thing, "__qualname__") else getattr(thing, "func", type(thing))
    return f"{named.__module__}.{named.__qualname__}"


def steps(trainer: Any) -> int:
    """The configured length of the trainer's windows, in micro-batches."""
    return int(trainer.args.gradient_accumulation_steps)


def ranks(trainer: Any) -> int:
    """Over how many ranks the gradient is averaged, where `uncovered` finds nothing."""
    return int(trainer.accelerator.num_processes)


def uses_deepspeed(trainer: Any) -> bool:
    return bool(trainer.is_deepspeed_enabled)


def uncovered(trainer: Any) -> str | None:
    """What this trainer runs with that the repairs of losses do not cover, or None."""
    module: Any = sys.modules["transformers.trainer"]
    if module.is_sagemaker_mp_enabled():
        return "SageMaker's model parallelism"
    if getattr(trainer, "use_apex", False):
        return "apex"
    if trainer.args.n_gpu > 1:
        return f"torch's DataParallel over {trainer.args.n_gpu} GPUs"
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if kind in ("XLA", "TPU", "MEGATRON_LM"):
        return f"distributed_type {kind}"
    for name, size in _parallel_sizes(trainer):
        if size > 1:
            return f"{name} {size}"
    return None


def _parallel_sizes(trainer: Any) -> Iterator[tuple[str, int]]:
    """The sizes of the groups whose ranks share a micro-batch, as far as the releases tell."""
    yield "tp_size", getattr(trainer.args, "tp_size", 0) or 0
    plugin = getattr(trainer.accelerator.state, "torch_tp_plugin", None)
    yield "tp_size", getattr(plugin, "tp_size", 1) or 1
    config = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        yield name, getattr(config, name, 1) or 1
    for name in ("get_tp_size", "get_cp_size", "get_sp_size"):
        if hasattr(trainer, name):
            yield name.removeprefix("get_"), getattr(trainer, name)() or 1
