"""Run many configurations of OpenRLHF's SFTTrainer in one child process, and say how much every token counted.

From a test: ``run(stack("0.9.10"), [{"steps": 8}], trainfix=False, ranks=2)``.

How OpenRLHF runs on a CPU is in trainfix.proofs.openrlhf_experiment. Only flash-attn, which does not install without a
GPU, is not the real one here: its padding helpers are in tests/support/flash_attn_on_cpu. Ring attention, tensor
parallelism and models in bf16 are not run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.support import experiment, stacks, trainer_runs
from tests.support.trainer_runs import Result

run = functools.partial(trainer_runs.run, program="tests.support.openrlhf_runs")
"""`trainer_runs.run` with OpenRLHF's SFTTrainer and this module's `Configuration`."""


def stack(openrlhf: str, deepspeed: str = "0.19.6", **packages: str) -> list[Path]:
    """The folders of this release, with what it needs and the test environment lacks.

    Every release runs with the environment's transformers, and with any DeepSpeed.
    """
    on_cpu = Path(__file__).with_name("flash_attn_on_cpu")
    wanted = {"openrlhf": openrlhf, "deepspeed": deepspeed, "peft": "0.18.1", **packages}
    return [stacks.ROOT, on_cpu, *stacks.stack(**wanted)]  # OpenRLHF's wheels bring a package `tests` of their own


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One training run of SFTTrainer on the tiny model, in float32.

    `steps`: micro-batches per window and rank. `rows`: rows in the data set, over all ranks. `rows_per_batch`: rows in
    a micro-batch. `lengths`: trained tokens of the k-th row, over and over. `stage`, `offload`, `clip`: DeepSpeed's.
    `evaluation`: rows of an evaluation after every window; 0 is none. `consumed`: samples that an earlier run has
    trained on. `packing`: packing_samples. `fits`: how often `fit` is called. `reverted`: advisories that are reverted
    for this run. `prepare`: ``module:function`` that is called with (trainer, fit's arguments) before training, for
    what a test wants to change.
    """

    steps: int = 8
    rows: int = 8
    epochs: int = 1
    rows_per_batch: int = 1
    lengths: Sequence[int] = ()
    stage: int = 2
    offload: bool = False
    clip: float = 0.0
    evaluation: int = 0
    consumed: int = 0
    packing: bool = False
    fits: int = 1
    reverted: Sequence[str] = ()
    prepare: str | None = None


BOTH: Mapping[str, Any] = {"offload": True, "rows": 16}
"""OpenRLHF's own settings for little GPU memory: accumulation over 8 micro-batches, and the optimizer on the CPU."""

STATES: Mapping[str, str | None] = {
    "nothing": None,
    "loss only": "TF-0001,TF-0003,TF-0004,TF-0009,TF-0013",
    "optimizer only": "TF-0101",
    "both": "",
}
"""What is repaired -> TRAINFIX_DISABLE; None is a run without trainfix."""


def both_together(state: str, *, openrlhf: str = "0.9.10", deepspeed: str = "0.18.9", ranks: int = 1) -> Result:
    """One run of OpenRLHF with the DeepSpeed that it requires, in one of the `STATES`: the result of `run`."""
    disabled = STATES[state]
    env = {"TRAINFIX_DISABLE": disabled} if disabled else {}
    (result,) = run(stack(openrlhf, deepspeed), [BOTH], trainfix=disabled is not None, ranks=ranks, env=env)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.


def perform(values: Mapping[str, Any], result: Result) -> None:
    """Train, and write into the result: `windows`, `logs` (what wandb is told), `left_over` (micro-batches of a window
    that never ended), `parameters` (a hash of them in the end), `as_before` (whether the trainer's attributes are its
    own again), `replaced` (methods of SFTTrainer that are not what its module defines)."""
    configuration = Configuration(**values)
    if not configuration.reverted:
        _perform(configuration, result)
        return
    trainfix: Any = sys.modules["trainfix"]
    trainfix.revert(*configuration.reverted)
    try:
        _perform(configuration, result)
    finally:
        trainfix.apply(*configuration.reverted)


def _perform(configuration: Configuration, result: Result) -> None:
    import torch

    trainer_runs.start_deepspeed()
    _spare_ray()
    shared: Any = importlib.import_module("untouched.proofs.openrlhf_experiment")
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    result["release"] = importlib.metadata.version("openrlhf")
    rows = tokens.answers(configuration.rows, lengths=configuration.lengths or tokens.LENGTHS)
    more = tokens.answers(configuration.evaluation, seed=1)
    model = tokens.tiny_llama(attn_implementation="eager", use_cache=False)
    watch = _watch(tokens, model)
    watch.learn(rows)
    passed_on = ("steps", "epochs", "rows_per_batch", "stage", "offload", "clip", "packing")
    wanted = {name: getattr(configuration, name) for name in passed_on}
    trainer, args = shared.build(shared.modules(), model, rows, evaluation=more, **wanted)
    trainer._wandb = told = SimpleNamespace(logs=[], finish=lambda: None)
    told.log = told.logs.append
    engine = trainer.model.model
    trainer_runs.judge_steps(engine.optimizer.optimizer, watch, lambda: SimpleNamespace(deepspeed=engine))
    if configuration.prepare is not None:
        trainer_runs.named(configuration.prepare)(trainer, args)
    attributes, forward = dict(vars(trainer)), vars(trainer.loss_fn).get("forward")
    torch.manual_seed(1)
    try:
        for _ in range(configuration.fits):
            trainer.fit(args, configuration.consumed, max(1, configuration.rows // trainer.batch_size))
    finally:
        result["windows"] = watch.windows
        result["logs"] = told.logs
        result["left_over"] = len(watch.seen)
        result["parameters"] = experiment.sha256(parameter.detach() for parameter in model.parameters())
        result["replaced"] = [name for name, value in vars(type(trainer)).items() if _is_replaced(value)]
        result["as_before"] = vars(trainer) == attributes and vars(trainer.loss_fn).get("forward") is forward
        engine.destroy()


def _is_replaced(value: object) -> bool:
    return hasattr(value, "__wrapped__")


def _spare_ray() -> None:
    """Up to 0.7.5 openrlhf.trainer imports every trainer there is, and so ray: let the package be there already."""
    if "openrlhf.trainer" in sys.modules:
        return
    found = importlib.util.find_spec("openrlhf.trainer")
    assert found is not None
    package = ModuleType("openrlhf.trainer")
    package.__path__ = list(found.submodule_search_locations or ())
    package.__spec__ = importlib.machinery.ModuleSpec("openrlhf.trainer", None, is_package=True)
    sys.modules["openrlhf.trainer"] = package


def _watch(tokens: Any, model: Any) -> Any:
    """A `Watch` that knows packed rows too: one line of tokens, in which every row begins at position 0."""

    class Watch(tokens.Watch):  # type: ignore[misc]
        def _record(self, model: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            positions = named["position_ids"]
            ids, begins = args[0], (positions[0] == 0).nonzero().reshape(-1).tolist()
            if len(ids) > 1 or len(begins) < 2:
                super()._record(model, args, named)
                return
            ends = [*begins[1:], len(ids[0])]
            packed = ids[0].tolist()
            self.seen.append([self._known(packed[a:b]) for a, b in zip(begins, ends, strict=True)])

    return Watch(model)


if __name__ == "__main__":
    trainer_runs.main(perform)
