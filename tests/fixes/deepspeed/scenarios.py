"""What a plain run of windows cannot express: things that happen in the middle of a window, and between engines.

The child's program of the tests in this folder. Each entry of its list is one of `Configuration`'s, plus
``"scenario": name``, a function of this file, and what that function asks for; ``"ask_for"`` names advisories to
repair by name, ``"tier"`` the way of offloaded gradients. Every scenario writes the windows it ran into
``result["windows"]``, and what else it found beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from tests.support import experiment
from tests.support.experiment import Configuration, Trial

Event = Callable[["Scripted"], object]
Result = dict[str, Any]

_NUMBERS = itertools.count()


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

        self.arrived = torch.zeros(self.configuration.ga, sum(self.sizes), dtype=torch.float64)
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


class Composed(Scripted):
    """A trial whose loss is put together as `call` says; `one` is the engine's forward, and `bare` the model's own."""

    def __init__(self, deepspeed: ModuleType, configuration: Configuration, call: str) -> None:
        super().__init__(deepspeed, configuration)
        self.call = call
        for model in (self.model, self.twin):
            model.forward = functools.partial(self._forward, model.forward)

    def _forward(self, forward: Callable[..., Any], inputs: Any, targets: Any = None) -> Any:
        """As models of transformers do: with targets, the loss and the logits that it comes from."""
        output = forward(inputs)
        if self.call == "two heads":
            return output[:, :1], output[:, 1:]
        return output if targets is None else {"loss": self._mean(output, targets), "logits": output}

    def _mean(self, output: Any, targets: Any) -> Any:
        import torch

        wide = torch.promote_types(output.dtype, torch.float32)
        return torch.nn.functional.mse_loss(output.to(wide), targets.to(wide))

    def _loss(self, model: Any, number: int, k: int, rank: int) -> Any:
        import torch

        dtype = torch.float64 if model is self.twin else self.dtype
        inputs, targets = (part.to(dtype) for part in experiment.batch(self.configuration, number, k, rank))
        one, bare = model, model if model is self.twin else model.module
        if self.call == "loss and logits":
            return one(inputs, targets)["loss"]
        if self.call == "loss and a term of the logits":
            output = one(inputs, targets)
            return output["loss"] + output["logits"].float().square().mean() / 8
        if self.call == "a forward of engine.module":
            return self._mean(bare(inputs), targets)
        if self.call == "a forward of the engine and one of engine.module":
            return self._mean(one(inputs), targets) + self._mean(bare(inputs.flip(1)), targets)
        if self.call == "a forward that feeds another":
            return self._mean(one(4 * one(inputs).repeat(1, 4)), targets)
        if self.call == "two forwards":
            return self._mean(one(inputs), targets) + self._mean(one(inputs.flip(1)), targets)
        if self.call == "two heads":
            left, right = one(inputs)
            return self._mean(left, targets[:, :1]) + self._mean(right, targets[:, 1:])
        raise ValueError(f"no such loss: {self.call}")


def _scripted(deepspeed: ModuleType, configuration: Configuration, call: str) -> Scripted:
    return Composed(deepspeed, configuration, call) if call else Scripted(deepspeed, configuration)


def composed(deepspeed: ModuleType, configuration: Configuration, result: Result, *, call: str) -> None:
    """Plain windows, with a loss that is put together as `call` says; then one more, and what `backward` returns."""
    trial = Composed(deepspeed, configuration, call)
    result["windows"] += [trial.window() for _ in range(configuration.windows)]
    result["parameters"] = trial.parameters()
    loss = trial._loss(trial.engine, configuration.windows, 0, deepspeed.comm.get_rank())
    told = {"scale_wrt_gas": False} if configuration.backward == "unscaled" else {}
    result["loss"], result["returned"] = float(loss), float(trial.engine.backward(loss, **told))


def perform(deepspeed: ModuleType, values: Mapping[str, Any], result: Result) -> None:
    """Run one entry: its scenario, or plain windows."""
    rest = dict(values)
    scenario = rest.pop("scenario", None)
    with _asking_for(rest.pop("ask_for", ())), _carried_by(rest.pop("tier", None)):
        if scenario is None:
            return experiment.windows(deepspeed, rest, result)
        _play(deepspeed, scenario, rest, result)


@contextlib.contextmanager
def _carried_by(tier: str | None) -> Iterator[None]:
    """As TRAINFIX_GRADCOPY=tier at the import would."""
    if tier is None or "trainfix" not in sys.modules:
        yield
        return
    finder, settings = (importlib.import_module(f"trainfix.{name}") for name in ("engine.finder", "settings"))
    before = finder.current
    finder.current = settings.read({"TRAINFIX_GRADCOPY": tier})
    yield
    finder.current = before


@contextlib.contextmanager
def _asking_for(ids: Sequence[str]) -> Iterator[None]:
    """A loss of precision is repaired only when it is asked for by name; for other configurations it is not."""
    trainfix = sys.modules.get("trainfix") if ids else None
    if trainfix:
        trainfix.apply(*ids)
    yield
    if trainfix:
        trainfix.revert(*ids)


def _play(deepspeed: ModuleType, scenario: str, rest: dict[str, Any], result: Result) -> None:
    asked = {key: rest.pop(key) for key in ("call", "optimizer_states", "shared_out") if key in rest}
    function: Callable[..., None] = globals()[scenario]
    function(deepspeed, Configuration(**rest), result, **asked)


def zero_grad(deepspeed: ModuleType, configuration: Configuration, result: Result, *, call: str) -> None:
    """In the second window, after its second micro-batch. `call` is engine.zero_grad or optimizer.zero_grad."""
    trial = Scripted(deepspeed, configuration)
    owner = {"engine": trial.engine, "optimizer": trial.zero}[call.partition(".")[0]]
    trial.events[1, 1] = lambda _: owner.zero_grad()
    result["windows"] += [trial.window() for _ in range(configuration.windows)]


def resume(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Save after two windows, and run two more. Then load into a new engine, and run these two again."""
    trial = Scripted(deepspeed, configuration)
    result["windows"] += [trial.window(), trial.window()]
    folder = _checkpoint(trial)
    result["windows"] += [trial.window(), trial.window()]
    result["uninterrupted"] = trial.parameters()
    fresh = Scripted(deepspeed, configuration)
    fresh.engine.load_checkpoint(folder)
    fresh.done = 2
    result["windows"] += [fresh.window(), fresh.window()]
    result["resumed"] = fresh.parameters()


def load_in_mid_window(
    deepspeed: ModuleType, configuration: Configuration, result: Result, *, optimizer_states: bool = True
) -> None:
    """Save after one window, run another, give up a third in its middle, load, and run the second again.

    Loading does not reset the engine's own count of micro-batches, so this takes a loop that sets the boundary.
    """
    trial = Scripted(deepspeed, configuration)
    result["windows"].append(trial.window())
    folder = _checkpoint(trial)
    result["windows"].append(trial.window())
    result["uninterrupted"] = trial.parameters()
    trial.abandon(2)
    trial.engine.load_checkpoint(folder, load_optimizer_states=optimizer_states)
    trial.done, trial.rows = 1, trial.rows[:1]
    result["windows"].append(trial.window())
    result["resumed"] = trial.parameters()


def _checkpoint(trial: Scripted) -> str:
    """Save, in the child's own folder, which all ranks share."""
    folder = str(Path.cwd() / f"checkpoint-{next(_NUMBERS)}")
    trial.engine.save_checkpoint(folder)
    return folder


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


def late_import(deepspeed: ModuleType, configuration: Configuration, result: Result, *, call: str = "") -> None:
    """`import trainfix` when one engine is in the middle of its second window and another has not begun its first.

    The third engine's `step` was captured by then, as a learning rate scheduler does that counts the steps.
    """
    assert "trainfix" not in sys.modules
    middle, before, captured = (_scripted(deepspeed, configuration, call) for _ in range(3))
    step, counted = captured.zero.step, []

    def counting(*args: Any, **named: Any) -> Any:
        counted.append(args)
        return step(*args, **named)

    captured.zero.step = counting
    middle.events[1, 1] = lambda _: importlib.import_module("trainfix")
    for name, trial in {"in mid-window": middle, "before its first window": before, "step captured": captured}.items():
        result[name] = [trial.window() for _ in range(configuration.windows)]
    result["counted"] = len(counted)


def revert(deepspeed: ModuleType, configuration: Configuration, result: Result, *, call: str = "") -> None:
    """`trainfix.revert()` in the middle of the second window, `trainfix.apply()` in the middle of the fourth."""
    trainfix = importlib.import_module("trainfix")
    trial = _scripted(deepspeed, configuration, call)
    trial.events[1, 1] = lambda _: result.update(back=trainfix.revert())
    trial.events[3, 1] = lambda _: trainfix.apply()
    result["windows"] += [trial.window() for _ in range(configuration.windows)]
    result["left on the optimizer"] = sorted(name for name in vars(trial.zero) if "trainfix" in name)
    result["left on the engine"] = sorted(name for name in vars(trial.engine) if "trainfix" in name)


def safe_gradients(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """What `safe_get_full_grad` gives right before the step of each window, and the engine's own norm after it."""
    trial = Scripted(deepspeed, configuration)
    seen: list[str] = []
    for number in range(configuration.windows):
        trial.events[number, configuration.ga - 1] = lambda this: seen.append(this.safe_gradient())
    result["windows"] += [trial.window() for _ in range(configuration.windows)]
    result["safe"] = seen


def unused_window(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """The side branch is used in every micro-batch of the first and third window, and in none of the second."""
    trial = Scripted(deepspeed, configuration)
    for used in "101":
        trial.configuration = dataclasses.replace(configuration, mask=used * configuration.ga)
        result["windows"].append(trial.window())


class OneSided(Scripted):
    """The first rank uses the side branch as the mask says; the others never do."""

    def _loss(self, model: Any, number: int, k: int, rank: int) -> Any:
        asked = self.configuration
        if rank:
            self.configuration = dataclasses.replace(asked, mask="0" * len(asked.mask))
        try:
            return super()._loss(model, number, k, rank)
        finally:
            self.configuration = asked


def used_on_one_rank(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Plain windows of a model whose side branch only the first rank uses."""
    trial = OneSided(deepspeed, configuration)
    result["windows"] += [trial.window() for _ in range(configuration.windows)]


@contextlib.contextmanager
def _warnings(result: Result) -> Iterator[None]:
    """Writes what trainfix warns of into ``result["warned"]``."""
    with _listening() as said:
        yield
    result["warned"] = [text for text in said if "is reached and not repaired" in text]


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """What trainfix says meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainfix").setLevel(logging.INFO)
    logging.getLogger("trainfix").addHandler(handler)
    yield said
    logging.getLogger("trainfix").removeHandler(handler)


def carried(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """How offloaded gradients travel: what is said when the engine is built, and by `status()` before and after."""
    trainfix = importlib.import_module("trainfix")

    def reason() -> str:
        return str(next(record.reason for record in trainfix.status() if record.id == "TF-0001"))

    reasons = [reason()]
    with _listening() as said:
        trial = Scripted(deepspeed, configuration)
        result["said"] = list(said)
        reasons.append(reason())
        result["windows"] += [trial.window() for _ in range(configuration.windows)]
        result["said_later"] = said[len(result["said"]) :]
    reasons.append(reason())
    result["reasons"] = reasons


def on_streams(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """The engine is built twice on what calls itself a device with streams, as a GPU would; then it is CPU again."""
    accelerator = type(deepspeed.get_accelerator())
    own = accelerator.resolves_data_dependency
    with _warnings(result):
        accelerator.resolves_data_dependency = lambda self: False
        trials = [Scripted(deepspeed, configuration) for _ in range(2)]
        accelerator.resolves_data_dependency = own
        result["windows"] += [trials[1].window() for _ in range(configuration.windows)]


def experts(deepspeed: ModuleType, configuration: Configuration, result: Result, *, shared_out: bool) -> None:
    """Builds an engine around a Mixture-of-Experts layer, whose two experts are shared out over the ranks, or not."""
    import torch

    moe = importlib.import_module("deepspeed.moe.layer")
    split = importlib.import_module("deepspeed.moe.utils").split_params_into_different_moe_groups_for_optimizer
    size = deepspeed.comm.get_world_size() if shared_out else 1
    expert = torch.nn.Sequential(torch.nn.Linear(8, 8))
    layer = moe.MoE(hidden_size=8, expert=expert, num_experts=2, ep_size=size, use_rts=False)
    groups = split({"params": list(layer.parameters()), "name": "all"})
    optimizer = torch.optim.SGD(groups, lr=1.0)
    with _warnings(result):
        deepspeed.initialize(model=layer, optimizer=optimizer, config=experiment.deepspeed_config(configuration))


def calls(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Count, in one window: buckets with this rank's gradients, calls of `Carrier.accumulate`, reads of a scalar."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = {"buckets": 0, "accumulate": 0, "segments": 0, "scalars": 0}

    class Scalars(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts["scalars"] += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    trial = Scripted(deepspeed, configuration)
    trial.window()
    _count_buckets(trial, counts)
    carrier = getattr(sys.modules.get("trainfix.gradcopy"), "Carrier", None)
    accumulate = getattr(carrier, "accumulate", None)

    def counted(self: Any, segments: Any, **named: Any) -> None:
        counts["accumulate"] += 1
        counts["segments"] += len(segments)
        accumulate(self, segments, **named)

    if carrier:
        carrier.accumulate = counted
    with Scalars():
        trial.abandon(configuration.ga)
    if carrier:
        carrier.accumulate = accumulate
    result["calls"] = counts | {"parameters": len(trial.trained)}


def _count_buckets(trial: Scripted, counts: dict[str, int]) -> None:
    """A bucket counts when the first of its gradients is taken, after its reduction."""
    reduce, take = trial.zero.average_tensor, trial.zero.copy_grads_in_partition
    fresh = True

    def average_tensor(*args: Any) -> Any:
        nonlocal fresh
        fresh = True
        return reduce(*args)

    def copy_grads_in_partition(*args: Any) -> Any:
        nonlocal fresh
        counts["buckets"] += fresh
        fresh = False
        return take(*args)

    trial.zero.average_tensor, trial.zero.copy_grads_in_partition = average_tensor, copy_grads_in_partition


def communicated(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """How many elements of each dtype this rank gives to collectives in one window, from the second on."""
    import torch

    trial = Scripted(deepspeed, configuration)
    result["windows"].append(trial.window())
    sent: dict[str, int] = {}
    collectives = {name: getattr(torch.distributed, name) for name in ("all_reduce", "reduce")}

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def count(tensor: Any, *args: Any, **named: Any) -> Any:
            sent[str(tensor.dtype)] = sent.get(str(tensor.dtype), 0) + tensor.numel()
            return collective(tensor, *args, **named)

        return count

    for name, collective in collectives.items():
        setattr(torch.distributed, name, counted(collective))
    trial.abandon(configuration.ga)
    for name, collective in collectives.items():
        setattr(torch.distributed, name, collective)
    result["communicated"] = sent


def untouched(deepspeed: ModuleType, configuration: Configuration, result: Result) -> None:
    """Whose functions stand in the optimizer's and the engine's class, before and after `import trainfix`."""
    classes = [
        importlib.import_module("deepspeed.runtime.zero.stage_1_and_2").DeepSpeedZeroOptimizer,
        importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine,
    ]
    before = _attributes(classes)
    importlib.import_module("trainfix")
    after = _attributes(classes)
    result["changed"] = [name for name in before | after if before.get(name) is not after.get(name)]
    functions = {name: value for name, value in after.items() if hasattr(value, "__code__")}
    ours = str(experiment.SOURCE / "trainfix")
    result["functions"] = len(functions)
    result["wrapped by trainfix"] = [
        name
        for name, function in functions.items()
        if function.__code__.co_filename.startswith(ours) or type(function) is not FunctionType  # wrapt's are not
    ]


def _attributes(classes: list[type]) -> dict[str, Any]:
    return {f"{cls.__name__}.{name}": value for cls in classes for name, value in vars(cls).items()}


if __name__ == "__main__":
    experiment.main(perform)
