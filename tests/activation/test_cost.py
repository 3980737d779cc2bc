"""What activation costs an interpreter that never imports a package to repair: at most a millisecond of CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.activation import children
from tests.activation.children import BOOTSTRAP, without_trainfix
from trainfix.cli.enable import LINE

BUDGET_SECONDS = 0.001
RUNS = 15
# What `site` does at the start of an interpreter; without -S Python does it before anybody can look at the clock.
START = "import time; begin = time.process_time(); import site; site.main(); print(time.process_time() - begin)"


def seconds(program: Path, env: dict[str, str]) -> float:
    """CPU time that one interpreter took for `site`."""
    done = subprocess.run([program, "-S", "-c", START], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return float(done.stdout)


@pytest.mark.parametrize("way", ["run", "enable"])
def test_an_interpreter_that_repairs_nothing_starts_within_the_budget(way: str, tmp_path: Path) -> None:
    plain, active = (children.environment(tmp_path / name, wheel=True) for name in ("plain", "active"))
    env = without_trainfix()
    if way == "enable":
        (active[1] / "trainfix_enable.pth").write_text(LINE)
    ours = env | {"PYTHONPATH": BOOTSTRAP} if way == "run" else env
    pairs = [(seconds(plain[0], env), seconds(active[0], ours)) for _ in range(RUNS)]
    extra = min(with_us for _, with_us in pairs) - min(without for without, _ in pairs)
    print(f"{way}: {extra * 1e3:.2f} ms of CPU more, on Python {sys.version.split()[0]}")
    assert extra <= 2 * BUDGET_SECONDS
