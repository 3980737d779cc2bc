"""Run many configurations of transformers' own Trainer in one child process, and say how much every token counted.

From a test: ``run(stack(transformers="4.45.2"), [{"steps": 8}], trainfix=False, ranks=2)``.

What is measured is in trainfix.proofs.token_experiment. The consumed gradient is what the torch optimizer sees when its
step begins; under DeepSpeed it is put together from the partitions by tests.support.layouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support import experiment, stacks

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One training run of transformers' Trainer on the tiny model.

    `steps`: gradient_accumulation_steps. `rows`: rows in the data set, over all ranks. `epochs`, `max_steps` (-1: by
    epochs). `rows_per_batch`: per_device_train_batch_size. `lengths`: trained tokens of the k-th row, over and over.
    `deepspeed`: None, or DeepSpeed's configuration, merged into one that needs no compiler; "stage" and "offload" are
    short for the usual ones. `arguments`: more TrainingArguments; the windows are judged by the smoothed loss where
    they smooth. `model`: changes to the tiny Llama's configuration. `trainer`: ``module:Class`` of the trainer,
    `Trainer` if it is not given, and `prepare`: ``module:function`` that is called with (trainer, configuration) before
    training, for what a test wants to change.
    `prompt_trained`: the prompts are trained too, the first token of a row has a label.
    """

    steps: int = 8
    rows: int = 16
    epochs: float = 1
    max_steps: int = -1
    rows_per_batch: int = 1
    lengths: Sequence[int] = ()
    deepspeed: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trainer: str = "transformers:Trainer"
    prepare: str | None = None
    shuffle: bool = False
    prompt_trained: bool = False


def run(
    folders: Sequence[Path],
    configurations: Sequence[Mapping[str, Any]],
    *,
    trainfix: bool,
    ranks: int = 1,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    program: str = "tests.support.trainer_runs",
) -> list[Result]:
    """One result per configuration, in order; see `perform` for what is in it. An `error` is a value: a text, or None.

    `program` is the module that the children run: one that calls `main` with its own `perform`.
    """
    variables = stacks.environment(*folders, trainfix=trainfix) | dict(env or {})
    how: dict[str, Any] = {"trainfix": trainfix, "ranks": ranks, "timeout": timeout, "program": program}
    return experiment.run(stacks.ROOT, configurations, env=variables, **how)


# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.

Perform = Callable[[Mapping[str, Any], Result], None]
"""Runs one configuration and writes what it found into the result, also when it raises."""


def main(perform: Perform | None = None) -> None:
    """The child's program: every configuration in the file, one JSON line each on the first rank's stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="JSON list of configurations")
    parser.add_argument("--trainfix", action="store_true", help="begin with `import trainfix`")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if arguments.trainfix:
        importlib.import_module("trainfix")
    untouched = ModuleType("untouched")  # trainfix's own modules under another name, without its activating __init__
    untouched.__path__ = [str(stacks.SOURCE / "trainfix")]
    sys.modules["untouched"] = untouched
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == 1:  # plain `python script.py`: no launcher, no group, unless DeepSpeed is asked for
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
    else:
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(json.dumps({"started": True}), file=out, flush=True)
    for number, values in enumerate(json.loads(Path(arguments.file).read_text())):
        result: Result = {"configuration": values, "error": None, "windows": []}
        begin = time.perf_counter()
        try:
            (perform or run_trainer)(values, result)
        except Exception as error:  # any failure of the release is a result here
            result["error"] = f"{type(error).__name__}: {error}"
        if "trainfix" in sys.modules:
            result["status"] = experiment._records(sys.modules["trainfix"])
        result["seconds"] = round(time.perf_counter() - begin, 3)
        in_step = ranks == 1 or _share_error(number, result)
        if first:
            print(json.dumps(result), file=out, flush=True)
        if not in_step:
            sys.stderr.flush()
            os._exit(3)
    out.close()
    sys.stderr.flush()
    os._exit(0)  # tearing gloo down can abort a process that has already answered


def _share_error(number: int, result: Result) -> bool:
    """Note another rank's error in `result`. False when the ranks ended differently: they are out of step then."""
    import torch
    from torch.distributed.distributed_c10d import _get_default_store

    rank, ranks, store = torch.distributed.get_rank(), torch.distributed.get_world_size(), _get_default_store()
    keys = [f"trainer_runs/{number}/{other}" for other in range(ranks)]
    store.set(keys[rank], result["error"] or "")
    try:
        store.wait(keys, timedelta(seconds=20))
    except RuntimeError:
        result["error"] = result["error"] or "another rank did not finish"
        return False
    errors = [store.get(key).decode() for key in keys]
    others = [f"rank {other}: {error}" for other, error in enumerate(errors) if error]
    result["error"] = result["error"] or "; ".join(others) or None
    return all(errors) or not any(errors)


def named(path: str) -> Any:
    """The object ``module:attribute``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def run_trainer(values: Mapping[str, Any], result: Result) -> None:
    """Train, and write into the result: `windows` (see Watch), `logs` (what a person sees), `release`."""
    import torch
    import transformers

    configuration = Configuration(**values)
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    result["release"] = transformers.__version__
    model = tokens.tiny_llama(**configuration.model)
    rows = tokens.answers(configuration.rows, **({"lengths": configuration.lengths} if configuration.lengths else {}))
    if configuration.prompt_trained:
        rows = [{**row, "labels": list(row["input_ids"])} for row in rows]
    smoothing = configuration.arguments.get("label_smoothing_factor", 0.0)
    watch = tokens.Watch(model, **({"losses": tokens.smoothed(smoothing)} if smoothing else {}))
    watch.learn(rows)
    base: Any = named(configuration.trainer)
    overrides = {} if configuration.shuffle else {"_get_train_sampler": _in_order}
    trainer = type(base.__name__, (base,), overrides)(
        model=model, args=training_arguments(configuration), train_dataset=Rows(rows), data_collator=tokens.collate
    )
    if configuration.prepare is not None:
        named(configuration.prepare)(trainer, configuration)
    watch_optimizer(trainer, watch)
    torch.manual_seed(1)
    try:
        trainer.train()
    finally:
        report(trainer, watch, configuration, result)


def report(trainer: Any, watch: Any, configuration: Configuration, result: Result) -> None:
    """Write into the result what a run has shown so far."""
    keys = ("loss", "grad_norm", "train_loss")
    result["windows"] = watch.windows
    result["logs"] = [{key: one[key] for key in keys if key in one} for one in trainer.state.log_history]
    result["left_over"] = len(watch.seen)  # micro-batches of a window that never ended
    if configuration.deepspeed is not None:
        trainer.accelerator.free_memory()


def training_arguments(configuration: Configuration, *, kind: Any = None, **more: Any) -> Any:
    """The run's TrainingArguments, or those of another `kind`: on the CPU, no clipping, every step logged, nothing
    saved."""
    import transformers

    wanted: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trainfix-"),
        "per_device_train_batch_size": configuration.rows_per_batch,
        "gradient_accumulation_steps": configuration.steps,
        "num_train_epochs": configuration.epochs,
        "max_steps": configuration.max_steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch",
        **({"ddp_backend": "gloo"} if "RANK" in os.environ and configuration.deepspeed is None else {}),
        **more,
        **configuration.arguments,
    }
    if configuration.deepspeed is not None:
        start_deepspeed()
        wanted["deepspeed"] = deepspeed_config(configuration.deepspeed)
    return (kind or transformers.TrainingArguments)(**wanted)


def start_deepspeed() -> None:
    """Import DeepSpeed on CPU, and give a lone process the group that a launcher would have announced."""
    import torch

    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    if "deepspeed" not in sys.modules or not torch.distributed.is_initialized():
        experiment._start()


def deepspeed_config(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration as a user of the Trainer writes it, without anything that needs a compiler."""
    more = dict(wanted)
    zero: dict[str, Any] = {"stage": more.pop("stage", 2), "reduce_bucket_size": 10**6}
    if more.pop("offload", False):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**zero, **more.pop("zero_optimization", {})},
        **more,
    }


class Rows:
    """A map-style data set."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def _in_order(trainer: Any, *_: Any) -> Any:
    import torch

    return torch.utils.data.SequentialSampler(trainer.train_dataset)


def watch_optimizer(trainer: Any, watch: Any) -> None:
    """Let `watch` judge every step of the optimizer that the trainer will build."""
    create = trainer.create_optimizer

    def created(*args: Any, **named: Any) -> Any:
        optimizer = create(*args, **named)
        judge_steps(trainer.optimizer, watch, lambda: trainer)
        return optimizer

    trainer.create_optimizer = created


def judge_steps(optimizer: Any, watch: Any, trainer: Callable[[], Any]) -> None:
    """Judge what this torch optimizer consumes, under DeepSpeed by what its engine's optimizer hands it."""
    layout: Any = None
    weights: dict[str, Any] = {}
    groups = len(optimizer.param_groups)  # DeepSpeed steps them one after the other

    def look(stepping: Any, *_: Any) -> None:
        nonlocal layout, weights
        engine = getattr(trainer(), "deepspeed", None)
        if not watch.seen:
            return  # some releases of DeepSpeed step once while they are built
        if engine is None:
            watch.judge(watch.consumed())
            return
        if layout is None:
            from tests.support import layouts

            layout = layouts.of(engine.optimizer, [one for one in engine.module.parameters() if one.requires_grad])
        if not layout.seen:
            weights = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
        layout.see(stepping)
        if len(layout.seen) >= groups:
            watch.judge(layout.consumed().double(), weights)
            layout.seen = {}

    optimizer.register_step_pre_hook(look)


if __name__ == "__main__":
    main()
