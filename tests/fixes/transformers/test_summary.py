"""What a user reads when transformers' Trainer is imported: the package puts a lazy module in its own place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.stacks import environment, stack

pytestmark = pytest.mark.slow


def test_one_line_says_what_was_repaired_in_transformers() -> None:
    env = environment(*stack(transformers="4.46.2"), trainfix=True)
    command = [sys.executable, "-c", "import trainfix, transformers.trainer"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("trainfix ")]
    assert line.endswith("TF-0411 applied (transformers 4.46.2)")
