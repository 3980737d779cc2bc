"""TF-0601, TF-0602: CPUOffloadOptimizer(offload_gradients=True) stops before a second backward costs a gradient."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fixes.torchao import runs
from tests.support import stacks
from trainfix.proofs import prove

NEW, OLD = "torchao.optim.cpu_offload", "torchao.prototype.low_bit_optim.cpu_offload"
# Both ends of each band that torch 2.13 can import: 0.11.0 and 0.12.0 import a module that it no longer has.
RELEASES = {"0.5.0": OLD, "0.6.1": OLD, "0.7.0": OLD, "0.9.0": OLD, "0.10.0": NEW, "0.13.0": NEW, "0.18.0": NEW}
NEWEST = "0.18.0"
ID = {OLD: "TF-0602", NEW: "TF-0601"}

RIGHT: Mapping[str, Mapping[str, Any]] = {
    "one backward per step": {"word": "bszbszbsz"},
    "zero_grad before backward": {"word": "zbszbs"},
    "no zero_grad": {"word": "bsbsbs"},
    "a backward thrown away": {"word": "bzbszbzbs"},
    "two backwards, different parameters": {"word": "12sz12sz"},
    "accumulated on the device": {"word": "bbbszbbbsz", "offload_gradients": False},
}
LOSING: Mapping[str, Mapping[str, Any]] = {
    "second backward": {"word": "bbs"},
    "second backward of the second window": {"word": "bszbbs"},
    "second backward after one was thrown away": {"word": "bzbbs"},
    "second backward of one parameter": {"word": "121s"},
}
BEFORE = {"second backward": "b", "second backward of one parameter": "12"}  # words up to what is written over

every_release = pytest.mark.parametrize(
    "version", [pytest.param(one, marks=() if one == NEWEST else pytest.mark.slow) for one in RELEASES]
)
one_of_each_band = pytest.mark.parametrize(
    "version",
    [
        pytest.param(one, marks=() if one == NEWEST else pytest.mark.slow)
        for one in ("0.5.0", "0.9.0", "0.10.0", NEWEST)
    ],
)


Results = Callable[..., tuple[dict[str, runs.Result], str]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All words on one release in one child, run once for all workers: the results by name, and what was said."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base

    def run(version: str, *, trainfix: bool, **env: str) -> tuple[dict[str, runs.Result], str]:
        first = {f"before: {name}": {"word": word} for name, word in BEFORE.items()}
        last = {"reverted": {"word": "brbs"}} if trainfix else {}
        words = {**RIGHT, **LOSING, **first, **last}
        asked = hashlib.sha256(json.dumps([version, trainfix, env, words]).encode()).hexdigest()[:16]
        file = shared / f"torchao-{asked}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                folder = stacks.folder("torchao", version)
                file.write_text(json.dumps(runs.run(folder, RELEASES[version], words, trainfix=trainfix, **env)))
        found, said = json.loads(file.read_text())
        return found, said

    return run


@every_release
def test_a_second_backward_before_a_step_stops_before_the_first_gradient_is_written_over(
    version: str, results: Results
) -> None:
    found, _ = results(version, trainfix=True)
    for name, run in LOSING.items():
        result = found[name]
        assert result["error"].startswith(f"UnfixedBugError: {ID[RELEASES[version]]} is reached and not repaired"), name
        assert result["advisory"] == ID[RELEASES[version]]
        assert result["done"] == run["word"][:-2]
    for name in BEFORE:
        assert found[name]["host"] == found[f"before: {name}"]["host"]


@one_of_each_band
def test_what_loses_nothing_goes_on_and_is_the_same_to_the_bit(version: str, results: Results) -> None:
    with_trainfix, said = results(version, trainfix=True)
    without, _ = results(version, trainfix=False)
    for name, run in RIGHT.items():
        assert with_trainfix[name]["error"] is None, name
        assert with_trainfix[name]["done"] == run["word"]
        for what in ("parameters", "consumed", "host"):
            assert with_trainfix[name][what] == without[name][what], name
    assert "is reached and not repaired" not in said


@one_of_each_band
def test_without_trainfix_nothing_stops_and_the_hooks_are_torchaos(version: str, results: Results) -> None:
    found, _ = results(version, trainfix=False)
    assert {result["error"] for result in found.values()} == {None}
    assert {hook for result in found.values() for hook in result["hooks"]} == {RELEASES[version]}


@one_of_each_band
def test_after_revert_nothing_stops(version: str, results: Results) -> None:
    reverted, released = (
        results(version, trainfix=True)[0]["reverted"],
        results(version, trainfix=False)[0]["second backward"],
    )
    assert reverted["error"] is None
    assert reverted["states"][ID[RELEASES[version]]] == "reverted"
    assert released["done"] == "bbs"


def test_the_words_name_three_ways_out(results: Results) -> None:
    words = results(NEWEST, trainfix=True)[0]["second backward"]["error"].splitlines()
    assert words[0].endswith("CPUOffloadOptimizer(offload_gradients=True) keeps only the last backward before a step.")
    assert words[1:] == [
        "  why it is reached: offload_gradients = True, and a parameter's second backward before step()",
        "  why it is not repaired: refused: trainfix knows it and does not repair it (torchao 0.18.0)",
        "Ways out:",
        "  (1) no torchao repairs it yet",
        "  (2) change the configuration: build CPUOffloadOptimizer with offload_gradients=False (the default), "
        "or train without gradient accumulation",
        "  (3) run `trainfix prove TF-0601`; if it shows that the error is absent here, set TRAINFIX_DISABLE=TF-0601",
        "TRAINFIX=warn turns this stop into a warning.",
    ]


@pytest.mark.slow
def test_warn_says_it_once_and_trains_as_without(results: Results) -> None:
    found, said = results(NEWEST, trainfix=True, TRAINFIX="warn")
    without, _ = results(NEWEST, trainfix=False)
    assert said.count("TF-0601 is reached and not repaired") == 1
    for name in LOSING:
        assert found[name]["error"] is None
        assert found[name]["parameters"] == without[name]["parameters"]


@pytest.mark.slow
def test_disabled_it_is_not_guarded(results: Results) -> None:
    found, said = results(NEWEST, trainfix=True, TRAINFIX_DISABLE="TF-0601")
    assert "TF-0601 is reached" not in said
    for name in LOSING:
        assert found[name]["error"] is None
        assert set(found[name]["hooks"]) == {NEW}
        assert found[name]["states"]["TF-0601"] == "disabled"


@pytest.mark.slow
def test_an_unknown_body_is_not_proved_and_only_warns(tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(stacks.folder("torchao", NEWEST), folder, ignore=shutil.ignore_patterns("*.so"))
    file = folder / "torchao" / "optim" / "cpu_offload.py"
    text = file.read_text(encoding="utf-8")
    changed = text.replace(
        "        param_groups = list(params)\n", "        param_groups = list(params)\n        assert True\n"
    )
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    found, said = runs.run(folder, NEW, {"second": LOSING["second backward"]})
    assert found["second"]["error"] is None
    assert found["second"]["states"]["TF-0601"] == "refused"
    assert said.count("TF-0601 is reached and not repaired") == 1
    assert "__init__ has an unknown body" in said


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.9.0", NEWEST])
def test_the_proof_shows_the_last_micro_batch_alone_and_that_the_run_is_stopped(version: str) -> None:
    record = prove(
        ID[RELEASES[version]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (stacks.folder("torchao", version), stacks.SOURCE)))},
    )
    assert (record["applicable"], record["reproduced"], record["repaired"]) == (True, True, None)
    assert record["before"]["coefficients"] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert record["before"]["relative_error"] == pytest.approx(0.93, abs=0.01)
    assert "trainfix stops this run before a gradient is lost" in record["reason"]
