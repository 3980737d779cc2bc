"""What a plain run of windows cannot express: things that happen in the middle of a window, and between engines.

The child's program of the tests in this folder. Each entry of its list is one of `Configuration`'s, plus
``"scenario": name``, a function of this file, and what that function asks for. Every scenario writes the windows it ran
into ``result["windows"]``, and what else it found beside them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support import experiment
from tests.support.experiment import Configuration, Trial

Event = Callable[["Scripted"], object]
Result = dict[str, Any]


class Scripted(Trial):
    """A trial in which something happens right after a backward: `events` maps (window, micro-batch) to it, from 0."""

    def __init__(self, deepspeed: ModuleType, configuration: Configuration, model: Any = None) -> None:
        super().__init__(deepspeed, configuration, model)
        self.events: dict[tuple[int, int], Event] = {}

    def _backward(self, number: int, k: int) -> None:
        super()._backward(number, k)
        self.events.get((number, k), lambda trial: None)(self)

    def abandon(self, micro_batches: int) -> None:
        """Begin a window, and leave it after so many of its micro-batches."""
        import torch

        elements = sum(parameter.numel() for parameter in self.trained)
        self.arrived = torch.zeros(self.configuration.ga, elements, dtype=torch.float64)
        for k in range(micro_batches):
            self.current = k
            self._backward(self.done, k)
            if self.configuration.driver == "every":
                self.engine.step()
        self.done += 1

    def safe_gradient(self) -> str:
        """sha256 of `safe_get_full_grad` of all trained parameters as it stands now."""
        import torch

        safe = importlib.import_module("deepspeed.utils").safe_get_full_grad
        return experiment.sha256([torch.cat([safe(parameter).reshape(-1) for parameter in self.trained])])


def perform(deepspeed: ModuleType, values: Mapping[str, Any], result: Result) -> None:
    """Run one entry: its scenario, or plain windows."""
    rest = dict(values)
    scenario = rest.pop("scenario", None)
    if scenario is None:
        return experiment.windows(deepspeed, rest, result)
    asked = {key: rest.pop(key) for key in ("call", "folder") if key in rest}
    function: Callable[..., None] = globals()[scenario]
    function(deepspeed, Configuration(**rest), result, **asked)


def zero_grad(deepspeed: ModuleType, configuration: Configuration, result: Result, *, call: str) -> None:
    """In the second window, after the second of its micro-batches: `call` is engine.zero_grad or optimizer.zero_grad."""
    trial = Scripted(deepspeed, configuration)
    owner = {"engine": trial.engine, "optimizer": trial.zero}[call.partition(".")[0]]
    trial.events[1, 1] = lambda _: owner.zero_grad()
    result["windows"] += [trial.window() for _ in range(configuration.windows)]


def resume(deepspeed: ModuleType, configuration: Configuration, result: Result, *, folder: str) -> None:
    """Save after two windows. Run two more; load into a new engine, and into the old one in mid-window, and run them again."""
    trial = Scripted(deepspeed, configuration)
    result["windows"] += [trial.window(), trial.window()]
    trial.engine.save_checkpoint(folder, tag="two")
    result["windows"] += [trial.window(), trial.window()]
    result["uninterrupted"] = trial.parameters()
    trial.abandon(2)
    fresh = Scripted(deepspeed, configuration)
    for name, loading in {"new engine": fresh, "mid-window": trial}.items():
        loading.engine.load_checkpoint(folder, tag="two")
        loading.done, loading.rows = 2, []
        result["windows"] += [loading.window(), loading.window()]
        result[name] = loading.parameters()


def several_engines(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Whole windows of a second engine run while the first is in the middle of its own, which has another length."""
    first, second = Scripted(deepspeed, configuration), Scripted(deepspeed, Configuration(ga=3))
    for number in range(configuration.windows):
        first.events[number, 1] = lambda _: result["windows"].append(second.window())
        result["windows"].append(first.window())


def destroy(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """An engine goes away in mid-window, and a new one takes over the same model."""
    old = Scripted(deepspeed, configuration)
    old.window()
    old.abandon(2)
    old.engine.destroy()
    new = Scripted(deepspeed, configuration, old.model)
    del old
    new.done = 2
    result["windows"] += [new.window() for _ in range(configuration.windows)]


def late_import(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """`import trainfix` when one engine is in the middle of its second window and another has not begun its first.

    The third engine's `step` was captured by then, as a learning rate scheduler does that counts the steps.
    """
    assert "trainfix" not in sys.modules
    middle, before, captured = (Scripted(deepspeed, configuration) for _ in range(3))
    step, counted = captured.zero.step, []

    def counting(*args: Any, **named: Any) -> Any:
        counted.append(args)
        return step(*args, **named)

    captured.zero.step = counting
    middle.events[1, 1] = lambda _: importlib.import_module("trainfix")
    for name, trial in {"in mid-window": middle, "before its first window": before, "step captured": captured}.items():
        result[name] = [trial.window() for _ in range(configuration.windows)]
    result["counted"] = len(counted)


def revert(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """`trainfix.revert()` in the middle of the second window, `trainfix.apply()` in the middle of the fourth."""
    trainfix = importlib.import_module("trainfix")
    trial = Scripted(deepspeed, configuration)
    trial.events[1, 1] = lambda _: result.update(back=trainfix.revert())
    trial.events[3, 1] = lambda _: trainfix.apply()
    result["windows"] += [trial.window() for _ in range(configuration.windows)]
    result["left on the optimizer"] = sorted(name for name in vars(trial.zero) if "trainfix" in name)


def safe_gradients(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """What `safe_get_full_grad` gives right before the step of each window, and the engine's own norm after it."""
    trial = Scripted(deepspeed, configuration)
    seen: list[str] = []
    for number in range(configuration.windows):
        trial.events[number, configuration.ga - 1] = lambda this: seen.append(this.safe_gradient())
    result["windows"] += [trial.window() for _ in range(configuration.windows)]
    result["safe"] = seen


def load_without_optimizer(deepspeed: ModuleType, configuration: Configuration, result: Result, *, folder: str) -> None:
    """Load a checkpoint in mid-window, leaving the optimizer's states as they are."""
    trial = Scripted(deepspeed, configuration)
    result["windows"].append(trial.window())
    trial.engine.save_checkpoint(folder, tag="one")
    trial.abandon(2)
    trial.engine.load_checkpoint(folder, tag="one", load_optimizer_states=False)
    result["windows"] += [trial.window(), trial.window()]


def calls(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Count, per window: buckets whose gradients this rank owns, calls of `gradcopy.accumulate`, and reads of a scalar."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Scalars(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Scalars.count += func.__name__ == "_local_scalar_dense.default"
            return func(*args, **(kwargs or {}))

    trial = Scripted(deepspeed, configuration)
    counts = {"buckets": 0, "accumulate": 0, "segments": 0}
    reduce, queue = trial.zero.average_tensor, trial.zero.copy_grads_in_partition
    pending: list[int] = []

    def average_tensor(*args: Any) -> Any:
        pending.clear()
        return reduce(*args)

    def copy_grads_in_partition(*args: Any) -> Any:
        counts["buckets"] += not pending
        pending.append(1)
        return queue(*args)

    trial.zero.average_tensor, trial.zero.copy_grads_in_partition = average_tensor, copy_grads_in_partition
    if "trainfix" in sys.modules:
        gradcopy = importlib.import_module("trainfix.gradcopy")
        accumulate = gradcopy.accumulate

        def counted(segments: Any) -> None:
            counts["accumulate"] += 1
            counts["segments"] += len(segments)
            accumulate(segments)

        gradcopy.accumulate = counted
    trial.window()
    counts.update(buckets=0, accumulate=0, segments=0)
    with Scalars():
        trial.abandon(configuration.ga - 1)
    result["windows"].append({"skipped": True})
    result["calls"] = counts | {"scalars": Scalars.count, "parameters": len(trial.trained)}
    if "trainfix" in sys.modules:
        gradcopy.accumulate = accumulate


def untouched(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Whose functions stand in the optimizer's and the engine's class, before and after `import trainfix`."""
    classes = [
        importlib.import_module("deepspeed.runtime.zero.stage_1_and_2").DeepSpeedZeroOptimizer,
        importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine,
    ]
    before = [dict(vars(cls)) for cls in classes]
    importlib.import_module("trainfix")
    names = [name for known, cls in zip(before, classes, strict=True) for name in known if known[name] is not vars(cls)[name]]
    result["changed"] = names
    ours = str(experiment.SOURCE / "trainfix")
    places = {name: getattr(getattr(value, "__code__", None), "co_filename", "") for cls in classes for name, value in vars(cls).items()}
    result["from trainfix"] = [name for name, place in places.items() if place.startswith(ours)]
    result["kinds"] = sorted({type(value).__name__ for cls in classes for value in vars(cls).values()})
    result["methods"] = sum(Path(place).is_file() for place in places.values())


if __name__ == "__main__":
    experiment.main(perform)
