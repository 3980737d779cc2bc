"""doctor on several released packages at once: errors that need certain releases of another package, and are repaired
through that package's repair."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.stacks import environment, stack

pytestmark = pytest.mark.slow


def findings(*options: str, **packages: str) -> dict[str, Any]:
    """id -> finding of doctor, with these releases installed."""
    command = [sys.executable, "-m", "trainfix", "doctor", "--format", "json", *options]
    env = environment(*stack(**packages), trainfix=True)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1, 3), done.stderr
    return {one["id"]: one for one in json.loads(done.stdout)["findings"]}


def test_trls_error_exists_with_the_transformers_that_has_it_and_is_repaired_through_it() -> None:
    found = findings("--assume-import", trl="0.18.2", transformers="4.53.3")
    assert [found[id]["verdict"] for id in ("TF-0301", "TF-0402")] == ["affected"] * 2
    assert [found[id]["repair"] for id in ("TF-0301", "TF-0402")] == ["available"] * 2
    assert found["TF-0301"]["repaired_by"] == "assumed import"


def test_with_another_transformers_the_same_trl_is_right() -> None:
    found = findings(trl="0.18.2", transformers="4.57.6")
    assert found["TF-0301"]["verdict"] == "not-affected"
    assert "it needs transformers>=4.46,<4.54; installed: 4.57.6" in found["TF-0301"]["because"][0]
    assert found["TF-0405"]["verdict"] == "affected"
    assert {found[id]["verdict"] for id in ("TF-0101", "TF-0201", "TF-0601")} == {"not-installed"}
