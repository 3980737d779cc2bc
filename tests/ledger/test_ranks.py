"""Two ranks with DistributedDataParallel: the first one's ledger sees both ranks' micro-batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def findings(fault):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ledger.two_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, rank, port, fault], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    said = [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]
    assert fault == "stop" or said[1] == []
    return said if fault == "stop" else said[0]


@pytest.mark.parametrize("fault", ["none", "uneven"])
def test_what_is_averaged_over_two_ranks_balances(fault):
    for found in findings(fault):
        assert (found["verdict"], found["apart"], found["missing"]) == ("balanced", 0, [])
        assert found["scale"] == pytest.approx(0.5, rel=1e-5)
        assert len(found["coefficients"]) == (7 if fault == "uneven" else 6)


def test_micro_batches_that_one_rank_drops_are_named():
    for found in findings("dropped on the second rank"):
        assert found["verdict"] == "unbalanced"
        wrong = {name for name, one in found["coefficients"].items() if abs(one - 1) > 1e-3}
        assert wrong == {"(1, 0)", "(1, 1)"}


def test_ranks_that_are_never_averaged_are_seen_to_go_apart():
    first, _ = findings("never averaged")
    assert first["verdict"] == "unbalanced"
    assert first["apart"] > 0.5


def test_every_rank_stops_before_a_step_that_is_wrong_on_one():
    first, second = findings("stop")
    for said in (first, second):
        assert [one["window"] for one in said] == [0]
        assert "micro-batches 1, 2 of rank 1 of 6 are dropped" in said[0]["stopped"]


def test_a_rank_that_does_not_report_is_named_after_a_while_and_nobody_hangs():
    for found in findings("one rank is off"):
        assert found["missing"] == [1]
