"""The benchmark of the host's sum runs, and its ratios are those of the times it took."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.timing import interleaved, interval_of_the_median


def test_a_ratio_is_taken_against_the_base_of_the_same_round(monkeypatch):
    """The machine is a hundred times slower in two rounds of five: no ratio is moved by that."""
    now, pace = 0.0, 1.0

    def lasts(length):
        def work():
            nonlocal now
            now += length * pace

        return work

    def slows():
        nonlocal pace
        pace = next(paces)

    paces = iter([1, 1, 100, 100, 1, 1])  # the first round is not counted
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(random.Random, "shuffle", lambda self, order: slows())
    found = interleaved({"one": lasts(1), "two": lasts(2)}, base="one", rounds=5)
    assert (found["two"]["ratio"], found["two"]["interval"]) == (2, [2, 2])
    assert (found["two"]["seconds"], found["two"]["fastest"]) == (2, 2)


def test_every_work_is_run_once_per_round_and_once_before_them():
    runs = {"one": 0, "two": 0, "three": 0}

    def counts(name):
        def work():
            runs[name] += 1

        return work

    interleaved({name: counts(name) for name in runs}, base="two", rounds=5)
    assert runs == {"one": 6, "two": 6, "three": 6}


def test_an_unknown_base_is_an_error_that_lists_the_works():
    with pytest.raises(ValueError, match="'three' is none of one, two"):
        interleaved({"one": int, "two": int}, base="three", rounds=1)


def test_the_interval_holds_the_median_and_is_a_point_without_spread():
    low, high = interval_of_the_median([1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.2])
    assert 0.9 <= low <= 1.0 <= high <= 1.2
    assert interval_of_the_median([2.0] * 5) == (2.0, 2.0)


def test_the_benchmark_of_the_host_writes_ratios_with_intervals(checkout: Path, tmp_path: Path):
    output = tmp_path / "result.json"
    command = [
        sys.executable,
        "benchmarks/host_accumulate.py",
        "--elements",
        "5000",
        "--rounds",
        "3",
        "-o",
        str(output),
    ]
    environment = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(output.read_text())["sizes"]
    assert table["elements"] == 5000
    assert table["ways"][table["base"]]["ratio"] == 1
    assert {"torch in chunks", "master.add_(gradient)", "bf16 += bf16", "copy of the master"} <= set(table["ways"])
    for way in table["ways"].values():
        low, high = way["interval"]
        assert low <= way["ratio"] <= high
        assert way["gigabytes_per_second"] > 0
