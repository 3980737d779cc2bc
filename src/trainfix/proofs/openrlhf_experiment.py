"""OpenRLHF's SFTTrainer on a CPU: what the proofs of its loss share.

The trainer, the strategy, the actor, the sampler, the loader and the collator are those of the installed OpenRLHF, the
engine is DeepSpeed's. What asks for a GPU is replaced: the device and its mesh, pinned memory, and the compiled Adam,
for which torch's stands in. OpenRLHF imports flash-attn, so that must be installed; its kernels are not used.

Runs only in a child interpreter (see `trainfix.proofs.prove`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from . import deepspeed_trainer, token_experiment
from .token_experiment import IGNORED, Row, Rows, Watch

NEVER = 10**9


def run(*, steps: int = 8, rows: int = 2 * len(token_experiment.LENGTHS), epochs: int = 1) -> None:
    """Train on one rank, and print the JSON object of the worst window."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    train = functools.partial(_train, steps=steps, rows=rows, epochs=epochs)
    token_experiment.run(train, packages=["openrlhf", "deepspeed", "transformers"])


def _train(*, steps: int, rows: int, epochs: int) -> Watch:
    """Train the tiny model, one row per micro-batch, with `steps` of them in a window, and watch it."""
    deepspeed_trainer.start()
    model = token_experiment.tiny_llama(attn_implementation="eager", use_cache=False)
    data = token_experiment.answers(rows)
    watch = Watch(model)
    watch.learn(data)
    trainer, args = build(modules(), model, data, steps=steps, epochs=epochs)
    watch.attach(trainer.model.model.optimizer)
    trainer.fit(args, 0, max(1, rows // steps))
    return watch


def modules() -> SimpleNamespace:
    """What is needed of OpenRLHF, imported on a machine without a GPU."""
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    kernels: Any = sys.modules
    kernels["flash_attn.ops.triton.cross_entropy"] = None  # OpenRLHF does without it where it cannot be imported
    strategies: Any = importlib.import_module("openrlhf.utils.deepspeed")
    if hasattr(strategies, "__path__"):  # up to 0.5.1 it is a module
        strategies = importlib.import_module("openrlhf.utils.deepspeed.deepspeed")
    if not hasattr(strategies, "on_cpu"):
        strategies.on_cpu = True
        _do_without_gpu(strategies)
    return SimpleNamespace(
        Strategy=strategies.DeepspeedStrategy,
        Dataset=importlib.import_module("openrlhf.datasets.sft_dataset").SFTDataset,
        Actor=importlib.import_module("openrlhf.models").Actor,
        SFTTrainer=importlib.import_module("openrlhf.trainer.sft_trainer").SFTTrainer,
    )


def _do_without_gpu(strategies: Any) -> None:
    """The mesh on the CPU, no pinned memory, no compiled optimizer."""
    if hasattr(strategies, "init_device_mesh"):
        mesh = strategies.init_device_mesh
        strategies.init_device_mesh = lambda _, *rest, **named: mesh("cpu", *rest, **named)
    for name in ("FusedAdam", "DeepSpeedCPUAdam"):
        if hasattr(strategies, name):
            setattr(strategies, name, torch.optim.AdamW)
    configure = strategies.get_train_ds_config

    def without_gpu(*args: Any, **named: Any) -> dict[str, Any]:
        config: dict[str, Any] = configure(*args, **named)
        config["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
        config["zero_optimization"]["reduce_bucket_size"] = 10**6
        if "optimizer" in config:
            config["optimizer"]["params"]["torch_adam"] = True
        return {**config, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}

    strategies.get_train_ds_config = without_gpu


def build(
    openrlhf: SimpleNamespace,
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    steps: int,
    epochs: int,
    rows_per_batch: int = 1,
    stage: int = 0,
    offload: bool = False,
    clip: float = 0.0,
    packing: bool = False,
    evaluation: Sequence[Row] = (),
) -> tuple[Any, SimpleNamespace]:
    """(a trainer of `model` on `rows` in their order, the arguments for its `fit`), in float32.

    With `evaluation` there is one on these rows after every window.
    """
    batch = steps * rows_per_batch * torch.distributed.get_world_size()
    args = _arguments(batch, rows_per_batch, stage, offload, packing, 1 if evaluation else NEVER)
    wanted = {"max_norm": clip, "zero_stage": stage, "train_batch_size": batch, "args": args}
    if "bf16" in inspect.signature(openrlhf.Strategy).parameters:
        wanted["bf16"] = False
    strategy = openrlhf.Strategy(micro_train_batch_size=rows_per_batch, **wanted)
    strategy.setup_distributed()
    actor = openrlhf.Actor(model)
    actor.packing_samples, actor.temperature = packing, 1.0
    actor, optimizer, schedule = _prepared(strategy, actor)
    load = functools.partial(_loader, openrlhf, strategy, rows_per_batch)
    accepted = inspect.signature(openrlhf.SFTTrainer).parameters
    trainer = openrlhf.SFTTrainer(
        model=actor,
        strategy=strategy,
        optim=optimizer,
        train_dataloader=load(rows, drop_last=True),
        eval_dataloader=load(evaluation, drop_last=False) if evaluation else None,
        scheduler=schedule,
        max_norm=clip,
        batch_size=batch,
        max_epochs=epochs,
        tokenizer=None,
        **({"disable_ds_ckpt": True} if "disable_ds_ckpt" in accepted else {}),
    )
    return trainer, args


def _arguments(
    batch: int, rows_per_batch: int, stage: int, offload: bool, packing: bool, eval_steps: int
) -> SimpleNamespace:
    """The command line's arguments: flat names up to 0.10.1, nested ones after."""
    return SimpleNamespace(
        local_rank=-1,
        aux_loss_coef=0.0,
        packing_samples=packing,
        use_wandb=None,
        use_tensorboard=None,
        param_dtype="fp32",
        bf16=False,
        adam_offload=offload,
        eval_steps=eval_steps,
        save_steps=NEVER,
        logging_steps=1,
        train_batch_size=batch,
        micro_train_batch_size=rows_per_batch,
        zpg=1,
        zero_stage=stage,
        optim="adam",
        ds=SimpleNamespace(param_dtype="fp32", adam_offload=offload, packing_samples=packing, zpg=1),
        model=SimpleNamespace(aux_loss_coef=0.0),
        train=SimpleNamespace(batch_size=batch, micro_batch_size=rows_per_batch),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1),
        eval=SimpleNamespace(steps=eval_steps),
        ckpt=SimpleNamespace(save_steps=NEVER),
    )


def _loader(
    openrlhf: SimpleNamespace, strategy: Any, rows_per_batch: int, rows: Sequence[Row], *, drop_last: bool
) -> Any:
    """The strategy's loader over these rows, as the data set of the release would hand them out."""
    masks = hasattr(openrlhf.Dataset, "get_loss_mask")  # from 0.7.0 on
    # From 0.5.4 to 0.6.4 the first token of an answer is not trained; here it is to be.
    shorter = int("source_len + 1" in inspect.getsource(openrlhf.SFTTrainer.fit))
    items: list[Any] = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        trained = torch.tensor([row["labels"]]) != IGNORED
        if masks:  # the mask of a token says whether the next one is trained
            items.append((ids, torch.ones_like(ids), torch.roll(trained.float(), -1, dims=1)))
        else:
            prompt = int(trained[0].int().argmax())
            items.append((prompt - shorter, ids, torch.ones_like(ids), {"input": "", "output": ""}))
    holder = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    collate = functools.partial(openrlhf.Dataset.collate_fn, holder)
    return strategy.setup_dataloader(Rows(items), rows_per_batch, False, False, collate, drop_last=drop_last)


def _prepared(strategy: Any, actor: Any) -> Any:
    """(actor with its engine, optimizer, schedule), made by the strategy."""
    schedules: Any = importlib.import_module("transformers.trainer")
    deepspeed: Any = sys.modules["deepspeed"]
    # 0.18.x with two ranks on CPU: all_gather dies with "Output 0 of Split is a view" unless grad is off.
    with torch.set_grad_enabled(not deepspeed.__version__.startswith("0.18.")):
        if hasattr(strategy, "create_optimizer"):
            optimizer = strategy.create_optimizer(actor, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
            return strategy.prepare((actor, optimizer, schedules.get_scheduler("constant", optimizer)))
        adam = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
        wanted = {"optim": "adam", "adam": adam, "lr_scheduler": "constant", "max_norm": strategy.max_norm}
        return strategy.prepare((actor, {**wanted, "muon": {}, "lr_warmup_ratio": 0.0, "scheduler_steps": 100}))
