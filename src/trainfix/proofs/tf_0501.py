"""Proof of TF-0501: a loop of accelerate over an epoch of one window and three micro-batches more, and the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from ..measure.coefficients import Coefficients, measure
from . import experiment

LEFT_OVER = 3


def main() -> None:
    asked = experiment.Experiment(config={"train_batch_size": 4 * experiment.MICRO_BATCHES})
    with_json = experiment.only_json_to_stdout()
    experiment.prepare_cpu()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", ACCELERATE_USE_DEEPSPEED="true")
    import accelerate  # type: ignore[import-untyped]
    import deepspeed

    torch.set_num_threads(1)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = _second_epoch(accelerate, asked)
    versions = {one.__name__: one.__version__ for one in (accelerate, deepspeed, torch)}
    judged_by = {"tolerance": asked.tolerance, "not_this_error": []}
    with_json(asdict(found) | judged_by | {"packages": versions, "status": experiment.status()})


def _second_epoch(accelerate: Any, asked: experiment.Experiment) -> Coefficients:
    """What the optimizer consumed last when the second epoch's first window has ended."""
    steps = asked.micro_batches
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=experiment._config(asked))
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=steps, deepspeed_plugin=plugin)
    model, reference = experiment._Model(asked), experiment._Model(asked).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    consumed: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda stepping, *_: consumed.append(_gradient(stepping)))
    loader: Any = torch.utils.data.DataLoader(range(steps + LEFT_OVER), batch_size=1)  # type: ignore[arg-type]
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch(number: int) -> Iterator[int]:
        for k, _ in enumerate(loader):
            with accelerator.accumulate(engine):
                accelerator.backward(experiment._loss(engine, model, asked, number, k, 0))
                optimizer.step()
                optimizer.zero_grad()
            yield k

    def rows(number: int, places: range) -> torch.Tensor:
        for own, weight in zip(reference.parameters(), model.parameters(), strict=True):
            own.data.copy_(weight.detach())
        return torch.stack([experiment._reference(reference, asked, number, k) for k in places])

    earlier = current = None
    for k in epoch(0):
        if k == steps - 1:  # these weights meet the rest of the epoch
            earlier = rows(0, range(steps, steps + LEFT_OVER))
    for k in epoch(1):
        current = rows(1, range(steps)) if current is None and k == 0 else current
        if k == steps - 1:
            break
    assert earlier is not None and current is not None
    return measure(current, consumed[-1], earlier=earlier)


def _gradient(optimizer: Any) -> torch.Tensor:
    """What `optimizer` is about to consume [elements]: one flat copy, padded at the end, or the parameters' own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.cat([parameter.grad.detach().reshape(-1).float() for parameter in parameters])
