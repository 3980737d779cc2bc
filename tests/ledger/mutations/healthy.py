"""Right runs, of which every window must balance. Each fault is an edit on top of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training run: the loop of tests.ledger.mutations.loops, what it is called with, on how many ranks, and what
    is laid over the environment. windows, optimizers: the ledger gives a verdict on each window of each optimizer.
    """

    name: str
    loop: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    packages: Mapping[str, str] = field(default_factory=dict)
    windows: int = 3
    optimizers: int = 1

    @property
    def verdicts(self) -> int:
        return self.windows * self.optimizers


_DEEPSPEED = {"deepspeed": "0.19.8"}
_CHECKPOINTING = {"gradient_checkpointing": True}

PLAIN = (
    Run("plain loop", "plain"),
    Run("clipping", "plain", {"clip": 0.05}),
    Run("clipping by value", "plain", {"clip_value": 0.002}),
    Run("SGD with momentum", "plain", {"optimizer": "SGD"}),
    Run("weight decay for matrices alone", "plain", {"groups": True}),
    Run("gradients are zeroed, not dropped", "plain", {"set_to_none": False, "groups": True}),
    Run("loss scale", "plain", {"scaled": True}),
    Run("loss scale and clipping", "plain", {"scaled": True, "clip": 0.05}),
    Run("a window is skipped, its loss scale was too large", "plain", {"scaled": True, "overflow": True}, windows=2),
    Run("evaluation in the middle of windows", "plain", {"evaluates": True}),
    Run("dropout", "plain", {"attention_dropout": 0.2}),
    Run("bf16 autocast", "plain", {"autocast": True}),
    Run("bf16 weights", "plain", {"dtype": "bfloat16"}),
    Run("tied weights", "plain", {"tie_word_embeddings": True}),
    Run("frozen layer", "plain", {"frozen": True}),
    Run("unused parameters", "plain", {"unused": True}),
    Run("packed documents", "plain", {"packed": True}),
    Run("left padding", "plain", {"left": True}),
    Run("torch.compile", "plain", {"compiled": True}),
    Run("windows of one micro-batch", "plain", {"micro_batches": [1, 1, 1]}),
    Run("accumulation in buffers of one's own", "buffers"),
    Run("two optimizers of one model", "several", {"kind": "one model"}, optimizers=2),
    Run("two models against each other", "several", {"kind": "two models"}, optimizers=2),
    Run("an auxiliary loss goes back by itself", "objectives", {"objective": "auxiliary"}),
    Run("distillation", "objectives", {"objective": "distillation"}),
    Run("the sum over tokens", "objectives", {"objective": "summed"}),
    Run("z-loss", "objectives", {"objective": "z_loss"}),
    Run("weights token by token", "objectives", {"objective": "weighted"}),
    Run("policy gradient", "objectives", {"objective": "policy"}),
    Run("policy gradient, windows of one sign", "objectives", {"objective": "one_sign"}),
    Run("preference loss", "objectives", {"objective": "preference"}),
    Run("accelerate", "accelerated"),
    Run("accelerate, clipping", "accelerated", {"clip": 0.05}),
    Run("accelerate, two epochs", "accelerated", {"epochs": 2, "sizes": [3, 1]}, windows=4),
)
TRAINER = (
    Run("Trainer", "hf_trainer"),
    Run("Trainer, clipping", "hf_trainer", {"max_grad_norm": 0.05}),
    Run("Trainer, label smoothing", "hf_trainer", {"label_smoothing_factor": 0.1}),
    Run("Trainer, bf16", "hf_trainer", {"bf16": True}),
    Run("Trainer, left padding", "hf_trainer", {"collator": "left"}),
    Run("Trainer, language modeling collator", "hf_trainer", {"collator": "language modeling"}),
    Run("Trainer, packed by its collator", "hf_trainer", {"collator": "flattened"}),
    Run(
        "Trainer, checkpointing",
        "hf_trainer",
        _CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    Run(
        "Trainer, reentrant checkpointing",
        "hf_trainer",
        _CHECKPOINTING
        | {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "model": {"attention_dropout": 0.2}},
    ),
    Run("Trainer, LoRA", "hf_trainer", {"lora": True}, packages={"peft": "0.18.1"}),
)
TWO_RANKS = (
    Run("DDP, no_sync", "ranks", ranks=2),
    Run("DDP, no_sync and clipping", "ranks", {"clip": 0.05}, ranks=2),
    Run("DDP, every micro-batch", "ranks", {"kind": "every"}, ranks=2),
    Run("DDP, communication hook", "ranks", {"kind": "hook"}, ranks=2),
    Run("ranks averaged by hand", "ranks", {"kind": "by hand"}, ranks=2),
    Run("FSDP2, every micro-batch", "shards", ranks=2),
    Run("FSDP2, bf16, last micro-batch", "shards", {"every": False, "mixed": True}, ranks=2),
    Run("FSDP2, clipping", "shards", {"clip": 0.05}, ranks=2),
    Run("accelerate, two ranks", "accelerated", ranks=2),
    Run("Trainer, two ranks", "hf_trainer", {"ranks": 2}, ranks=2),
)
STAGES = tuple(
    Run(
        f"DeepSpeed stage {stage}{', offload' if offload else ''}",
        "hf_trainer",
        {"ranks": ranks, "deepspeed": {"stage": stage, "offload": offload}},
        ranks=ranks,
        packages=_DEEPSPEED,
    )
    for stage, offload, ranks in (
        (0, False, 2),
        (1, False, 2),
        (2, False, 2),
        (2, True, 1),
        (3, False, 2),
        (3, True, 1),
    )
)
ENGINE = (
    Run("DeepSpeed's engine", "engine", {"stage": 2}, packages=_DEEPSPEED),
    Run("DeepSpeed's engine, stage 1, clipping", "engine", {"stage": 1, "clip": 0.05}, ranks=2, packages=_DEEPSPEED),
    Run("DeepSpeed's engine, stage 3, clipping", "engine", {"stage": 3, "clip": 0.05}, packages=_DEEPSPEED),
    Run("DeepSpeed's engine, fp16", "engine", {"stage": 2, "fp16": True}, packages=_DEEPSPEED),
)

HEALTHY: tuple[Run, ...] = (*PLAIN, *TRAINER, *TWO_RANKS, *STAGES, *ENGINE)
BY_NAME = {run.name: run for run in HEALTHY}

# Right where they are meant so, which a window alone does not show. They are run, and shown, and not counted.
ACCUSED: tuple[Run, ...] = (Run("the mean of sequence means", "objectives", {"objective": "sequence_means"}),)
