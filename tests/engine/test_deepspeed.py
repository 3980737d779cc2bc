"""The engine on a real DeepSpeed 0.18.9: a handful of orders, a release that is not the one we know, and ZenFlow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Once
from tests.support import standin
from tests.support.releases import release
from trainfix.settings import ADVISORY_IDS

pytestmark = pytest.mark.slow

IDS = ("TF-0001", "TF-0003")
APPLIED = dict.fromkeys(IDS, "applied")
EVERY_ID = ",".join(ADVISORY_IDS)
REFUSED = r"TF-0001, TF-0003.* refused \(deepspeed 0\.18\.9\): .*reset_cpu_buffers has an unknown body"
WHOLE, LOST = [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]
STAGE_2 = Path("deepspeed", "runtime", "zero", "stage_1_and_2.py")

Results = Callable[..., dict[str, Any]]


def altered(folder: Path, function: str, old: str, new: str) -> Path:
    """A copy of DeepSpeed 0.18.9 in which one token of one function of stage_1_and_2.py is another."""
    shutil.copytree(release("0.18.9"), folder, ignore=shutil.ignore_patterns("__pycache__", "csrc", "bin"))
    text = (folder / STAGE_2).read_text(encoding="utf-8")
    begin = text.index(f"    def {function}(")
    end = text.index("\n    def ", begin)
    assert old in text[begin:end]
    (folder / STAGE_2).write_text(text[:begin] + text[begin:end].replace(old, new, 1) + text[end:], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def results(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one run found; all runs of this file share one warm interpreter, which forks for each."""
    found = once("deepspeed", lambda: _run(tmp_path_factory.mktemp("deepspeed")))
    return lambda name, place="deepspeed-0.18.9", **env: found[_key(name, place, env)]


def _run(folder: Path) -> dict[str, Any]:
    """What every run found. Altered copies of the release go into `folder`."""
    original = release("0.18.9")
    evidence = altered(folder / "evidence", "async_accumulate_grad_in_cpu_via_gpu", "torch.zeros(", "torch.empty(")
    target = altered(folder / "target", "reset_cpu_buffers", "{}", "dict()")
    entries: list[tuple[str, Path, dict[str, str]]] = [
        *((name, original, {}) for name in ORDERS),
        ("four_steps", evidence, {}),
        ("driven_to_four", evidence, {}),
        ("four_steps", evidence, {"TRAINFIX": "strict"}),
        ("four_steps", target, {}),
        ("two_steps", target, {}),
        ("driven_to_four", target, {}),
        ("four_steps", target, {"TRAINFIX": "warn"}),
        ("four_steps", target, {"TRAINFIX": "strict"}),
        ("four_steps", target, {"TRAINFIX_DISABLE": EVERY_ID}),
        *(("zenflow", original, {"UPDATE_INTERVAL": interval}) for interval in ("4", "2", '"auto"')),
        ("zenflow", original, {"UPDATE_INTERVAL": "4", "TRAINFIX": "warn"}),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.deepspeed_runs"],
        input=json.dumps([{"run": name, "release": str(place), "env": env} for name, place, env in entries]),
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(standin.SOURCE), str(standin.ROOT)]), "PYTHONWARNINGS": "ignore"}
        | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    keys = [_key(name, place.name, env) for name, place, env in entries]
    return dict(zip(keys, json.loads(done.stdout), strict=True))


def _key(name: str, place: str, env: dict[str, str]) -> str:
    return f"{name} {place} {sorted(env.items())}"


ORDERS = (
    "trainfix_first",
    "deepspeed_first",
    "engine_first",
    "between_halves",
    "threads",
    "reload",
    "fork",
    "from_import",
    "back_and_forth",
)


@pytest.mark.parametrize("order", ORDERS[:7])
def test_whatever_the_order_every_micro_batch_arrives_on_0_18_9(order: str, results: Results) -> None:
    found = results(order)
    assert found["error"] is None
    assert found["states"] == APPLIED
    assert found["coefficients"] == WHOLE
    lines = re.findall(r"TF-0001, TF-0003, .* applied \(deepspeed 0\.18\.9\)", found["said"])
    assert len(lines) == (2 if order == "reload" else 1)


def test_trainfix_really_came_while_stage_1_and_2_was_half_imported(results: Results) -> None:
    assert set(results("between_halves")["half"]) == {True}


def test_threads_that_import_at_once_do_not_wait_for_each_other(results: Results) -> None:
    assert results("threads")["alive"] == [False] * 3


def test_after_a_reload_both_classes_are_repaired_and_both_are_reverted(results: Results) -> None:
    found = results("reload")
    assert found["new class"] is True
    assert found["with the new class"] == WHOLE
    assert found["reverted"] == found["reverted, old class"] == LOST


def test_a_class_taken_by_from_import_is_repaired_and_gets_its_own_method_back(results: Results) -> None:
    found = results("from_import")
    assert found["replaced"] is True and found["back"] is True
    assert found["states"] == dict.fromkeys(IDS, "reverted")


def test_revert_brings_the_error_back_and_apply_takes_it_away_on_the_same_engine(results: Results) -> None:
    assert results("back_and_forth")["coefficients"] == [WHOLE, LOST, WHOLE, WHOLE]


# --- one token is another --------------------------------------------------------------------------------------------


def test_an_unknown_evidence_function_is_refused_and_warned_and_not_patched(results: Results) -> None:
    found = results("four_steps", "evidence")
    assert found["error"] is None
    assert found["states"]["TF-0001"] == "refused"
    assert "async_accumulate_grad_in_cpu_via_gpu has an unknown body (shape " in found["reasons"]["TF-0001"]
    assert found["coefficients"] == LOST
    assert re.search(r"trainfix 0\.1\.0: TF-0001.* refused \(deepspeed 0\.18\.9\)", found["said"])
    assert found["said"].count("TF-0001 is reached and not repaired") == 1  # not proved on this code: no stop


def test_the_other_advisory_of_the_fix_relies_on_the_same_function(results: Results) -> None:
    found = results("driven_to_four", "evidence")
    assert found["error"].startswith("UnfixedBugError: TF-0003 is reached and not repaired")
    assert "async_accumulate_grad_in_cpu_via_gpu has an unknown body" in found["said"]


def test_an_unknown_target_is_never_patched(results: Results) -> None:
    for name in ("four_steps", "two_steps", "driven_to_four"):
        found = results(name, "target")
        if "states" in found:
            assert found["states"] == dict.fromkeys(IDS, "refused")
            assert found["touched"] == ["__init__"]
            assert "DeepSpeedZeroOptimizer.reset_cpu_buffers has an unknown body" in found["reasons"]["TF-0001"]
        assert re.search(REFUSED, found["said"])


def test_a_run_that_reaches_what_was_refused_stops_with_three_ways_out(results: Results) -> None:
    words = results("four_steps", "target")["error"]
    assert words.startswith("UnfixedBugError: TF-0001 is reached and not repaired: ZeRO-2 with CPU offload drops")
    assert "why it is reached: ZeRO stage 2, offload_optimizer, gradient_accumulation_steps = 4" in words
    assert "DeepSpeedZeroOptimizer.reset_cpu_buffers has an unknown body (shape " in words
    assert "(1) move to deepspeed 0.19.0 or newer\n      it also changes: " in words
    assert "it also changes: gradient_clipping defaults to 1.0 instead of 0.0 from 0.19.3 (#8068)" in words
    assert "(2) change the configuration: set zero_optimization.stage to 1 or 3, or gradient_accumulation" in words
    assert "(3) run `trainfix prove TF-0001`; if it shows that the error is absent here, set TRAINFIX_DISABLE" in words


def test_an_event_that_reaches_what_was_refused_stops_before_it(results: Results) -> None:
    words = results("driven_to_four", "target")["error"]
    assert words.startswith("UnfixedBugError: TF-0003 is reached and not repaired")
    assert "set_gradient_accumulation_boundary(False)" in words


def test_a_run_that_does_not_reach_it_trains(results: Results) -> None:
    found = results("two_steps", "target")
    assert found["error"] is None
    assert found["coefficients"] == [1.0, 1.0]


def test_warn_trains_on_and_disable_says_nothing(results: Results) -> None:
    warned = results("four_steps", "target", TRAINFIX="warn")
    assert (warned["error"], warned["coefficients"]) == (None, LOST)
    assert "TF-0001 is reached and not repaired" in warned["said"]
    disabled = results("four_steps", "target", TRAINFIX_DISABLE=EVERY_ID)
    assert (disabled["error"], disabled["coefficients"]) == (None, LOST)
    assert disabled["states"] == dict.fromkeys(IDS, "disabled")
    assert disabled["touched"] == []
    assert "trainfix" not in disabled["said"]


@pytest.mark.parametrize("copy", ["evidence", "target"])
def test_strict_stops_at_the_import_of_deepspeed(copy: str, results: Results) -> None:
    found = results("four_steps", copy, TRAINFIX="strict")
    assert found["error"].startswith("UnfixedBugError: trainfix 0.1.0: TF-0001")
    assert "refused (deepspeed 0.18.9): DeepSpeedZeroOptimizer." in found["error"]
    assert "coefficients" not in found and "states" not in found


# --- ZenFlow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "shown"), [("4", "4"), ('"auto"', "auto")])
def test_a_zenflow_optimizer_that_reaches_the_error_stops_when_it_is_built(
    interval: str, shown: str, results: Results
) -> None:
    words = results("zenflow", UPDATE_INTERVAL=interval)["error"]
    assert words.startswith("UnfixedBugError: TF-0001 is reached and not repaired")
    assert f"why it is reached: ZenFlow with an update interval of {shown}" in words
    assert "why it is not repaired: the repair does not cover ZenFlowZeroOptimizer" in words


def test_a_zenflow_optimizer_with_a_short_interval_is_not_stopped(results: Results) -> None:
    found = results("zenflow", UPDATE_INTERVAL="2")
    assert (found["error"], found["built"], found["steps"]) == (None, "ZenFlowZeroOptimizerSequential", 2)
    assert "TF-0001 is reached" not in found["said"]


def test_warn_lets_zenflow_be_built(results: Results) -> None:
    found = results("zenflow", UPDATE_INTERVAL="4", TRAINFIX="warn")
    assert (found["error"], found["steps"]) == (None, 4)
    assert "ZenFlow with an update interval of 4" in found["said"]
