"""TF-0032: what a loss that does not come from one engine forward alone gives the optimizer, without trainfix and with.

TF-0008, which the same fix repairs: test_unscaled_backward.py.
"""

from __future__ import annotations

import gc
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.fixes.deepspeed.judging import assert_right, assert_same_bits, assert_window_right, states, windows
from tests.support import accelerate_runs, experiment
from tests.support.releases import release
from tests.support.stacks import stack
from trainfix.fixes.deepspeed import backward_division

RELEASES = ("0.18.3", "0.18.4", "0.18.9", "0.19.0", "0.19.5")
LOSS = {"scenario": "composed", "call": "loss and logits", "stage": 1, "offload": False, "ga": 3, "windows": 2}
TWICE = ("loss and logits", "loss and a term of the logits", "a forward that feeds another")
NEVER = ("a forward of engine.module", "a forward of the engine and one of engine.module")
WRONG = {call: {**LOSS, "call": call} for call in TWICE + NEVER}
HEADS = {"two heads": {**LOSS, "call": "two heads"}}
UNSCALED = {"divided by the caller": {**LOSS, "backward": "unscaled"}}
ONCE = HEADS | {
    "two forwards": {**LOSS, "call": "two forwards"},
    "two heads, fp16": {**LOSS, "call": "two heads", "dtype": "fp16"},
    "two heads in stage 2": {**LOSS, "call": "two heads", "stage": 2},
    "loss and logits in stage 3": {**LOSS, "stage": 3},  # whose outputs pass a function of its own: one hook each
    "one step": {**LOSS, "ga": 1},
    "an engine of one step": {**LOSS, "driver": "accelerate"},
}
PLACES = {
    "stage 0": {**LOSS, "stage": 0},
    "stage 2": {**LOSS, "stage": 2},
    "stage 2, offload": {**LOSS, "stage": 2, "offload": True},
    "stage 3": {**LOSS, "stage": 3, "call": "a forward of the engine and one of engine.module"},
    "bf16": {**LOSS, "dtype": "bf16"},
    "fp16": {**LOSS, "dtype": "fp16"},
    "8 steps": {**LOSS, "ga": 8},
    "boundary by hand": {**LOSS, "driver": "boundary"},
    "reentrant checkpointing": {**LOSS, "checkpointing": "reentrant"},
    "in turn with a loss divided by the caller": {**LOSS, "ga": 4, "backward": "engine,unscaled"},
}
REVERT = {"revert": {**LOSS, "scenario": "revert", "windows": 5}}
LATE = {"late import": {**LOSS, "scenario": "late_import", "windows": 3}}
UNTOUCHED = {"untouched": {"scenario": "untouched"}}
TORCH = {"loss.backward()": {**LOSS, "backward": "torch"}}  # divided twice all the same: no part of the advisory
EVERYWHERE = WRONG | HEADS | UNSCALED
ON_0_18_9 = EVERYWHERE | ONCE | PLACES | TORCH
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def without(runs):
    """Release -> the runs without trainfix, on one rank."""
    tables = dict.fromkeys(RELEASES, EVERYWHERE) | {"0.18.9": ON_0_18_9 | LATE}
    return lambda version: runs(version, tables[version], trainfix=False, env={"TRAINFIX": "on"}, timeout=600)


@pytest.fixture(scope="module")
def repaired(runs):
    """Release -> the runs with trainfix, on one rank."""
    tables = dict.fromkeys(RELEASES, EVERYWHERE) | {"0.18.9": ON_0_18_9 | REVERT}
    return lambda version: runs(version, tables[version], trainfix=True, timeout=600)


@pytest.fixture(scope="module")
def upstream(runs):
    """DeepSpeed 0.19.6, which has the repair, without trainfix."""
    return runs("0.19.6", WRONG, trainfix=False)


def assert_wrong(result):
    for window in windows(result):
        assert window["relative_error"] > 0.05


@slow
@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("name", WRONG)
def test_such_a_loss_is_divided_twice_or_never(without, version, name):
    result = without(version)[name]
    assert_wrong(result)
    expected = {"loss and logits": 1 / 3, "a forward of engine.module": 3}.get(name)
    for window in windows(result) if expected else ():
        assert window["coefficients"] == pytest.approx([expected] * 3, abs=1e-3)


@slow
@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("name", WRONG)
def test_with_trainfix_it_is_divided_once_with_the_bits_of_0_19_6(repaired, upstream, version, name):
    result = repaired(version)[name]
    assert states(result)["TF-0032"] == "applied"
    assert_right(result)
    assert [w["sha256"] for w in windows(result)] == [w["sha256"] for w in windows(upstream[name])]


@slow
@pytest.mark.parametrize("version", RELEASES)
def test_two_heads_are_divided_once_and_stay_the_same_bit_for_bit(without, repaired, version):
    before, after = without(version)["two heads"], repaired(version)["two heads"]
    assert_right(before)
    assert_same_bits(before, after)


@slow
@pytest.mark.parametrize("name", ONCE)
def test_a_loss_that_0_18_9_divides_once_stays_the_same_bit_for_bit(without, repaired, name):
    assert_right(without("0.18.9")[name])
    assert_same_bits(without("0.18.9")[name], repaired("0.18.9")[name])


@slow
def test_loss_backward_without_the_engine_stays_as_it_is_on_0_18_9(without, repaired):
    assert_same_bits(without("0.18.9")["loss.backward()"], repaired("0.18.9")["loss.backward()"])


@slow
@pytest.mark.parametrize("version", RELEASES)
def test_what_the_caller_divides_is_not_divided_again(without, repaired, version):
    name = "divided by the caller"
    assert_right(repaired(version)[name])
    if version != "0.18.3":  # TF-0008
        assert_same_bits(without(version)[name], repaired(version)[name])


@slow
@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_backward_returns_what_it_returned(without, repaired, version, name):
    for result in (without(version)[name], repaired(version)[name]):
        assert result["returned"] == pytest.approx(result["loss"] / (1 if name in UNSCALED else 3))


@slow
@pytest.mark.parametrize("name", PLACES)
def test_it_is_divided_once_in_every_stage_and_precision(without, repaired, name):
    assert_wrong(without("0.18.9")[name])
    for window in windows(repaired("0.18.9")[name]):
        if "bf16" in name:  # a loss divided by 3 is rounded in 16 bits on its way, and so is each gradient
            assert window["coefficients"] == pytest.approx([1] * 3, abs=2e-2)
        else:
            assert_window_right(window)


@slow
def test_revert_in_mid_window_lets_that_window_finish_on_0_18_9(repaired):
    """Reverted in the middle of the second window, applied again in the middle of the fourth."""
    result = repaired("0.18.9")["revert"]
    first, second, third, fourth, fifth = windows(result)
    for window in (first, second, fifth):
        assert_window_right(window)
    for window in (third, fourth):
        assert window["coefficients"] == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert "TF-0032" in result["back"]
    assert result["left on the engine"] == []


@slow
def test_import_in_mid_window_repairs_the_next_window_on_0_18_9(without):
    result = without("0.18.9")["late import"]
    assert result["error"] is None
    before, during, after = result["in mid-window"]
    for window in (before, during):
        assert window["coefficients"] == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert_window_right(after)
    for window in result["before its first window"]:
        assert_window_right(window)


@slow
@pytest.mark.parametrize("name", ["loss and logits", "a forward of the engine and one of engine.module"])
def test_two_ranks_divide_it_once_only_with_trainfix(runs, name):
    table = {one: WRONG[one] for one in ("loss and logits", "a forward of the engine and one of engine.module")}
    assert_wrong(runs("0.19.5", table, trainfix=False, ranks=2)[name])
    assert_right(runs("0.19.5", table, trainfix=True, ranks=2)[name])


@slow
@pytest.mark.parametrize(("version", "state"), [("0.18.2", "not-affected"), ("0.19.6", "fixed-upstream")])
def test_other_releases_are_right_and_left_alone(runs, version, state):
    results = runs(version, WRONG | UNTOUCHED, trainfix=True)
    for name in WRONG:
        assert_right(results[name])
        assert states(results[name])["TF-0032"] == state
    ours = {"DeepSpeedEngine.backward", "DeepSpeedEngine._backward_prologue_per_tensor"}
    assert not ours & set(results["untouched"]["wrapped by trainfix"])


@slow
def test_where_it_is_refused_only_such_a_loss_is_stopped(tmp_path):
    """0.18.9 with another text in a message of `forward`, which the repair relies on."""
    folder = shutil.copytree(release("0.18.9"), tmp_path / "deepspeed-0.18.9")
    file = folder / "deepspeed/runtime/engine.py"
    text = file.read_text()
    assert text.count("executing without DeepCompile until") == 1
    file.write_text(text.replace("executing without DeepCompile until", "executing without it until"))
    wanted = [*WRONG.values(), *ONCE.values(), *UNSCALED.values()]
    results = experiment.run(folder, wanted, trainfix=True, program="tests.fixes.deepspeed.scenarios")
    stopped, passed = results[: len(WRONG)], results[len(WRONG) :]
    for name, result in zip(WRONG, stopped, strict=True):
        assert "TF-0032 is reached and not repaired" in result["error"]
        divisor = 1 if name in NEVER else 9
        why = f"gradient_accumulation_steps = 3, and backward() divides a part of this loss by {divisor}"
        assert why in result["error"]
        assert states(result)["TF-0032"] == "refused"
    for result in passed:
        assert_right(result)


@slow
@pytest.mark.parametrize("version", ["0.18.9", "0.19.5"])
def test_a_plain_loop_with_accelerate_and_transformers_keeps_its_scale(version):
    packages = stack(transformers="4.57.1", accelerate="1.11.0", deepspeed=version)
    rows = [{"steps": 4, "rows": 8, "deepspeed": {"stage": 2, "offload": offload}} for offload in (False, True)]
    device, offloaded = accelerate_runs.run(packages, rows, trainfix=False)
    repaired = accelerate_runs.run(packages, rows, trainfix=True)
    assert device["error"] is None
    assert offloaded["error"] is None
    assert [one for window in device["windows"] for one in window["coefficients"]] == pytest.approx([1 / 4] * 8)
    for result in repaired:
        assert result["error"] is None
        assert [one for window in result["windows"] for one in window["coefficients"]] == pytest.approx([1] * 8)


# ---------------------------------------------------------------------------------------------------------------------
# Which losses the hooks divide once: a graph, some of whose tensors an engine hooks.


class Engine:
    def __init__(self, steps=4):
        self.steps = steps

    def gradient_accumulation_steps(self):
        return self.steps

    def divide(self, grad):
        return grad / self.steps

    def hook(self, tensor):
        """As DeepSpeed does it."""
        backward_division._mark(SimpleNamespace(preprocess_per_tensor_fn=self.divide), tensor)
        tensor.register_hook(self.divide)
        return tensor


class Split(torch.autograd.Function):
    """Two outputs of one node."""

    @staticmethod
    def forward(ctx, x):
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, left, right):
        return left * 2 + right * 3


@pytest.fixture
def weight():
    return torch.ones(3, requires_grad=True)


@pytest.fixture
def engine():
    return Engine()


def _nested(weight, engine):
    logits = engine.hook(weight * 2)
    return engine.hook(logits.sum())


def _sum_of_split(weight, hook):
    left, right = Split.apply(weight)
    return hook(left).sum() + right.sum()


GRAPHS = {
    "an output": (lambda w, e: e.hook(w * 2).sum(), None),
    "an output that is the loss": (lambda w, e: e.hook((w * 2).sum()), None),
    "no output": (lambda w, e: (w * 2).sum(), 1),
    "an output and what is none": (lambda w, e: e.hook(w * 2).sum() + (w * 3).sum(), 1),
    "an output of an output": (_nested, 16),
    "an output that is hooked twice": (lambda w, e: e.hook(e.hook(w * 2)).sum(), 16),
    "two outputs": (lambda w, e: e.hook(w * 2).sum() + e.hook(w * 3).sum(), None),
    "two outputs of one node": (lambda w, e: sum(e.hook(part).sum() for part in Split.apply(w)), None),
    "one of two outputs of a node": (lambda w, e: _sum_of_split(w, e.hook), 1),
    "an output and a detached one": (lambda w, e: (e.hook(w * 2) * _nested(w, e).detach()).sum(), None),
}
BEYOND = {
    "an output of an engine with other steps": (lambda w, e: Engine(3).hook(w * 2).sum(), 3),
    "an output of an engine that feeds another": (lambda w, e: e.hook(Engine(2).hook(w * 2) * 2).sum(), 8),
    "an output of an engine of one step that feeds it": (lambda w, e: e.hook(Engine(1).hook(w * 2) * 2).sum(), None),
    "an output and a leaf of the user's own": (lambda w, e: (e.hook(w * 2) * torch.ones(3).requires_grad_()).sum(), 1),
}


@pytest.mark.parametrize("name", GRAPHS | BEYOND)
def test_what_the_hooks_divide_by_is_read_from_the_graph(weight, engine, name):
    build, wrong = (GRAPHS | BEYOND)[name]
    assert backward_division._wrong_divisor(build(weight, engine), 4) == wrong


@pytest.mark.parametrize("name", GRAPHS)
def test_torch_gives_the_gradient_of_a_fourth_of_the_loss_exactly_where_nothing_is_wrong(weight, engine, name):
    build, wrong = GRAPHS[name]
    (found,) = torch.autograd.grad(build(weight, engine), weight)
    (want,) = torch.autograd.grad(build(weight, SimpleNamespace(hook=lambda tensor: tensor)) / 4, weight)
    assert torch.equal(found, want) == (wrong is None)


def test_a_mark_goes_with_its_node_and_not_with_its_tensor(weight, engine):
    gc.collect()
    before = len(backward_division._outputs)
    output = engine.hook(weight * 2)
    loss = output.sum()
    del output
    assert len(backward_division._outputs) == before + 1
    loss.backward()
    del loss
    assert len(backward_division._outputs) == before


class Node:
    """A node of a graph that counts how often one looks behind it."""

    looked = 0

    def __init__(self, *below):
        self.below = tuple((node, 0) for node in below)
        self.metadata = {}

    @property
    def next_functions(self):
        Node.looked += 1
        return self.below


def test_nothing_behind_the_only_output_is_followed(engine, monkeypatch):
    monkeypatch.setattr(backward_division, "_outputs", set())
    behind = Node()
    for _ in range(1000):
        behind = Node(behind)
    Node.looked = 0
    output = SimpleNamespace(grad_fn=behind, output_nr=0)
    backward_division._mark(SimpleNamespace(preprocess_per_tensor_fn=engine.divide), output)
    loss = SimpleNamespace(grad_fn=Node(behind), output_nr=0)
    assert backward_division._wrong_divisor(loss, 4) is None
    assert Node.looked == 1


def test_a_graph_is_followed_once_however_many_ways_lead_through_it(engine, monkeypatch):
    """Two outputs, behind which the ways double at every one of 60 nodes."""
    monkeypatch.setattr(backward_division, "_outputs", set())
    behind = Node()
    for _ in range(60):
        behind = Node(behind, behind)
    outputs = [Node(behind), Node(behind)]
    for node in outputs:
        tensor = SimpleNamespace(grad_fn=node, output_nr=0)
        backward_division._mark(SimpleNamespace(preprocess_per_tensor_fn=engine.divide), tensor)
    Node.looked = 0
    loss = SimpleNamespace(grad_fn=Node(*outputs), output_nr=0)
    assert backward_division._wrong_divisor(loss, 4) is None
    assert Node.looked == 1 + 2 + 61
