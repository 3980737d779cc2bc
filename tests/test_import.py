"""What `import trainfix` costs: exactly these modules, and a few milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support import standin

# What is loaded because of `import trainfix` in a bare interpreter, which has loaded os.
IMPORTED = [
    "trainfix",
    "trainfix.engine",
    "trainfix.engine.finder",
    "trainfix.engine.targets",
    "trainfix.settings",
]
# __future__ is the standard library's, and costs next to nothing.
STANDARD_LIBRARY = ["__future__"]
BUDGET_SECONDS = 0.003
RUNS = 7


def bare(script: str) -> Any:
    """What `script` prints, as JSON, in an interpreter without site-packages."""
    preamble = f"import sys; sys.path.insert(0, {str(standin.SOURCE)!r}); sys.dont_write_bytecode = False\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", preamble + script],
        env={"PATH": os.environ.get("PATH", "")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_trainfix_imports_exactly_these_modules() -> None:
    script = "import os; before = set(sys.modules); import trainfix; new = sorted(set(sys.modules) - before)\n"
    found = bare(script + "import json; print(json.dumps(new))")
    assert found == sorted(IMPORTED + STANDARD_LIBRARY)


def test_importing_trainfix_takes_at_most_three_milliseconds_of_cpu() -> None:
    script = "import os, time; begin = time.process_time(); import trainfix; print(time.process_time() - begin)"
    times = [bare(script) for _ in range(RUNS)]
    assert min(times) < 2 * BUDGET_SECONDS, f"seconds of CPU: {times}"


def test_public_names_load_when_asked_for_and_nothing_else_does() -> None:
    script = """
import trainfix, json
suspects = ("json.decoder", "trainfix.engine.lifecycle", "wrapt", "logging", "dataclasses")
early = [name for name in suspects if name in sys.modules]
public = sorted(trainfix.__all__)
assert sorted(dir(trainfix)) == public
try:
    trainfix.aply
except AttributeError as error:
    words = str(error)
error = trainfix.UnfixedBugError
assert issubclass(error, RuntimeError) and "trainfix.engine.lifecycle" not in sys.modules
print(json.dumps([early, public, words]))
"""
    early, public, words = bare(script)
    assert early == ["json.decoder"]
    assert public == ["UnbalancedError", "UnfixedBugError", "__version__", "apply", "ledger", "revert", "status"]
    assert words.startswith(
        "module 'trainfix' has no attribute 'aply'; it has UnbalancedError, UnfixedBugError, __version__, apply"
    )
