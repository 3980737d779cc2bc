"""FSDP1 and FSDP2 on two ranks without an accelerator: right training balances, and what goes wrong is named.

The model is a tiny Llama; see `tests.ledger.fsdp_runs`, where the configurations run one after the other.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NAMED = "model.layers.1.mlp.up_proj.weight"
RUN = ("sync", "model", "fault", "clip", "how")


def fsdp1(strategy="FULL_SHARD", original=True, **options):
    run = {name: options.pop(name) for name in RUN if name in options}
    return {"kind": "fsdp1", "options": {"strategy": strategy, "use_orig_params": original, **options}, **run}


def fsdp2(kind="fsdp2", **options):
    run = {name: options.pop(name) for name in RUN if name in options}
    return {"kind": kind, "options": options, **run}


RIGHT = {
    f"FSDP1, {strategy}{', original parameters' if original else ''}, {sync} averaged": fsdp1(
        strategy, original, sync=sync
    )
    for strategy in ("NO_SHARD", "FULL_SHARD", "SHARD_GRAD_OP")
    for original in (True, False)
    for sync in ("every", "last")
} | {
    "FSDP1, offload": fsdp1(original=False, offload=True),
    "FSDP1, offload, every averaged": fsdp1(original=False, offload=True, sync="every"),
    "FSDP1, offload, original parameters": fsdp1("SHARD_GRAD_OP", offload=True),
    "FSDP1, bf16": fsdp1(bf16=True),
    "FSDP1, bf16, every averaged": fsdp1(original=False, bf16=True, sync="every"),
    "FSDP1, each linear layer": fsdp1(linear=True),
    "FSDP1, clipped": fsdp1(clip="by all"),
    "FSDP1, tied": fsdp1(model="tied"),
    "FSDP1, tied, flat parameters": fsdp1(original=False, model="tied"),
    "FSDP1, frozen": fsdp1(model="frozen"),
    "FSDP1, a frozen layer, flat parameters": fsdp1(original=False, model="frozen layer"),
    "FSDP2": fsdp2(),
    "FSDP2, every averaged": fsdp2(sync="every"),
    "FSDP2, offload": fsdp2(offload=True),
    "FSDP2, offload, every averaged": fsdp2(offload=True, sync="every"),
    "FSDP2, bf16": fsdp2(bf16=True),
    "FSDP2, bf16, every averaged": fsdp2(bf16=True, sync="every"),
    "FSDP2, not resharded": fsdp2(reshard_after_forward=False),
    "FSDP2, output matrix": fsdp2(head=True),
    "FSDP2, clipped": fsdp2(clip="by all"),
    "FSDP2, tied": fsdp2(model="tied"),
    "FSDP2, frozen": fsdp2(model="frozen"),
    "FSDP2, hybrid": fsdp2("hybrid"),
    "FSDP2, hybrid, every averaged": fsdp2("hybrid", sync="every"),
    "FSDP2, a branch that the first window does not use": fsdp2(model="branch"),
}
KINDS = {
    "FSDP1": fsdp1(),
    "FSDP1, flat parameters": fsdp1(original=False),
    "FSDP1, NO_SHARD": fsdp1("NO_SHARD"),
    "FSDP2": fsdp2(),
}
FAULTS = ("dropped", "not cleared", "lost", "mean of means")
FAULTY = {f"{kind}, {fault}": one | {"fault": fault} for kind, one in KINDS.items() for fault in FAULTS} | {
    "FSDP1, every averaged, dropped": fsdp1(sync="every", fault="dropped"),
    "FSDP1, offload, dropped": fsdp1(original=False, offload=True, sync="every", fault="dropped"),
    "FSDP2, every averaged, dropped": fsdp2(sync="every", fault="dropped"),
    "FSDP1, NO_SHARD, never averaged": fsdp1("NO_SHARD", fault="never averaged"),
    "FSDP1, NO_SHARD, flat parameters, never averaged": fsdp1("NO_SHARD", False, fault="never averaged"),
    "FSDP1, each rank clipped by its own norm": fsdp1(clip="by each"),
    "FSDP2, never averaged": fsdp2(fault="never averaged"),
    "FSDP2, hybrid, never averaged": fsdp2("hybrid", fault="never averaged"),
}
FOUND = {f"{kind}, found": one | {"how": "found", "windows": 3} for kind, one in KINDS.items()} | {
    "FSDP2, a branch, found": fsdp2(model="branch", how="found"),
}
TOLD = {f"{kind}, told": one | {"windows": 3} for kind, one in KINDS.items()}
OFF = {f"{kind}, off": one | {"how": "off", "windows": 3} for kind, one in KINDS.items()}
OFFLOADED = {  # original parameters, sharded, on a device that is the host itself
    "offloaded": fsdp1(offload=True, sync="every"),
    "offloaded, off": fsdp1(offload=True, sync="every", how="off"),
    "neither offloaded nor cleared": fsdp1(sync="every", fault="not cleared", how="off"),
}


@cache
def results():
    """Name -> what `fsdp_runs` says; every configuration in one pair of processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    asked = json.dumps(RIGHT | FAULTY | FOUND | TOLD | OFF | OFFLOADED)
    command = [sys.executable, "-m", "tests.ledger.fsdp_runs"]
    ranks = [
        subprocess.Popen(
            [*command, rank, port, asked], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [errors[-3000:] for _, errors in outputs]
    return {row["name"]: row for row in map(json.loads, outputs[0][0].splitlines())}


def windows(name):
    """The verdicts of a run's two audited windows, which the ledger could read on both ranks."""
    found = results()[name]
    assert found["notes"] == [[], []]
    assert [one["window"] for one in found["windows"]] == [1, 2]
    return found["windows"]


def coefficients(*values):
    return pytest.approx(values, abs=0.02)


@pytest.mark.parametrize("name", RIGHT)
def test_right_training_balances_with_both_ranks_micro_batches_and_tokens_of_equal_weight(name):
    for window in windows(name):
        assert (window["state"], window["problems"]) == ("balanced", [])
        assert window["backwards"] == [[rank, number] for rank in (0, 1) for number in range(3)]
        assert (window["tokens"], window["counted"]) == ("even", 67)
        assert window["scale"] == pytest.approx(1, abs=0.02)


def test_only_sums_that_fsdp1_keeps_in_16_bits_until_they_are_averaged_are_remarked_on():
    rough = {
        name
        for name in RIGHT
        for window in windows(name)
        if any("added up in less precision" in remark for remark in window["remarks"])
    }
    assert rough == {"FSDP1, bf16"}


def test_parameters_that_no_micro_batch_of_a_window_uses_are_remarked_on():
    name = "FSDP2, a branch that the first window does not use"
    assert ["got no gradient" in str(window["remarks"]) for window in windows(name)][:2] == [True, False]


def test_frozen_parameters_are_not_accounted_for_and_tied_ones_once():
    everything, branch = windows("FSDP2")[0]["parameters"], 2
    assert windows("FSDP1, FULL_SHARD, last averaged")[0]["parameters"] == everything
    assert windows("FSDP1, tied")[0]["parameters"] == windows("FSDP2, tied")[0]["parameters"] == everything - 1
    assert windows("FSDP1, frozen")[0]["parameters"] == windows("FSDP2, frozen")[0]["parameters"] == everything - 10
    assert windows("FSDP2, a branch that the first window does not use")[0]["parameters"] == everything + branch


@pytest.mark.parametrize("name", [name for name in FAULTY if name.endswith("dropped")])
def test_a_micro_batch_that_is_dropped_in_the_middle_is_named_on_both_ranks(name):
    for window in windows(name):
        assert window["problems"] == ["micro-batches 2 of rank 0 and 2 of rank 1 of 6 are dropped"]
        assert window["coefficients"] == coefficients(1, 0, 1, 1, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_before_that_was_left_in_is_named(kind):
    first, second = windows(f"{kind}, not cleared")
    assert first["state"] == "balanced"
    assert second["problems"] == ["gradients of the window before are added again (its micro-batches 1 to 6)"]
    assert second["coefficients"] == coefficients(1, 1, 1, 1, 1, 1)
    assert second["earlier"] == coefficients(1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_loses_its_gradient_is_named_and_no_other(kind):
    for window in windows(f"{kind}, lost"):
        assert (window["state"], window["outliers"]) == ("not balanced", [NAMED])
        assert f"{NAMED} (nothing arrives)" in window["problems"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_means_of_means_give_tokens_uneven_weight_although_every_micro_batch_is_there(kind):
    for window in windows(f"{kind}, mean of means"):
        assert (window["state"], window["tokens"]) == ("not balanced", "uneven")
        assert window["coefficients"] == coefficients(1, 1, 1, 1, 1, 1)
        (problem,) = window["problems"]
        assert problem.startswith("tokens count up to 5.75 times as much as others: those of micro-batch 3 of rank 0 ")


@pytest.mark.parametrize("name", ["FSDP1, NO_SHARD", "FSDP1, NO_SHARD, flat parameters"])
def test_ranks_with_whole_gradients_that_are_never_averaged_are_seen_to_go_apart(name):
    for window in windows(f"{name}, never averaged"):
        assert window["apart"] > 0.5
        assert any("ranks consume different gradients" in problem for problem in window["problems"])


@pytest.mark.parametrize("name", ["FSDP2", "FSDP2, hybrid"])
def test_fsdp2_gives_its_optimizer_nothing_where_gradients_are_never_averaged_and_the_ledger_says_so(name):
    for window in windows(f"{name}, never averaged"):
        assert window["state"] == "not balanced"
        assert window["coefficients"] == coefficients(0, 0, 0, 0, 0, 0)


def test_ranks_that_clip_their_own_pieces_by_their_own_norms_are_found():
    for window in windows("FSDP1, each rank clipped by its own norm"):
        assert window["state"] == "not balanced"
        assert window["residual"] > 0.02


@pytest.mark.parametrize("name", FOUND)
def test_model_and_optimizer_are_found_by_themselves(name):
    for window in windows(name):
        assert (window["state"], window["tokens"], len(window["backwards"])) == ("balanced", "even", 6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_changes_no_bit_of_the_parameters(kind):
    without = results()[f"{kind}, off"]["parameters"]
    assert results()[f"{kind}, told"]["parameters"] == without
    assert results()[f"{kind}, found"]["parameters"] == without


def test_no_hook_is_left_behind():
    assert {name: found["hooks"] for name, found in results().items() if any(found["hooks"])} == {}


def test_original_parameters_offloaded_where_the_host_is_the_device_are_never_cleared_and_the_ledger_says_so():
    first, second = windows("offloaded")
    assert first["state"] == "balanced"
    assert second["problems"] == ["gradients of the window before are added again (its micro-batches 1 to 6)"]
    # torch 2.13 by itself: zero_grad has no effect on this combination, to the bit.
    runs = results()
    assert runs["offloaded, off"]["parameters"] == runs["neither offloaded nor cleared"]["parameters"]
