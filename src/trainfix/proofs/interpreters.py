"""The child interpreters in which experiments run: one without trainfix's repairs, one with them.

Only the standard library is imported here; the experiments need torch and run in `trainfix.proofs.host`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent

_WITHOUT_REPAIRS = """
import importlib, sys, types
package = types.ModuleType("untouched")  # the experiment's modules, without trainfix's activating __init__
package.__path__ = [{package!r}]
sys.modules["untouched"] = package
importlib.import_module("untouched.proofs.host").serve()
"""

_WITH_REPAIRS = """
import trainfix
import importlib
importlib.import_module("trainfix.proofs.host").serve()
"""


class ChildProblem(Exception):
    """The interpreter to examine cannot be started. The message names it."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment answered, or why it did not."""

    answer: Mapping[str, Any] | None
    problem: str | None = None


def search_path(python: str, environment: Mapping[str, str]) -> list[str]:
    """sys.path of that interpreter. Raises ChildProblem where it cannot be started."""
    code = "import json, sys; print(json.dumps(sys.path))"
    try:
        answer = subprocess.run(
            [python, "-c", code], env=dict(environment), capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ChildProblem(f"cannot run {python}: {error}; name an interpreter that starts") from error
    path: list[str] = json.loads(answer.stdout.splitlines()[-1])
    return path


@contextlib.contextmanager
def interpreters(python: str, environment: Mapping[str, str]) -> Iterator[tuple[Interpreter, Interpreter]]:
    """(the one without the repairs, the one with them). Both are killed when the block ends, with all below them."""
    with tempfile.TemporaryDirectory(prefix="trainfix-", ignore_cleanup_errors=True) as folder:
        without = Interpreter(python, environment, repairs=False, folder=folder)
        repaired = Interpreter(python, environment, repairs=True, folder=folder)
        try:
            yield without, repaired
        finally:
            without.stop()
            repaired.stop()


class Interpreter:
    """One child interpreter. It starts when it is first asked, and anew when it has ended.

    Its environment is free of the user's own settings of trainfix. It leads a session of its own, so that an interrupt
    at the terminal reaches nobody but us, and what it has started ends with it. Its temporary files lie in `folder`.
    """

    def __init__(self, python: str, environment: Mapping[str, str], *, repairs: bool, folder: str) -> None:
        code = _WITH_REPAIRS if repairs else _WITHOUT_REPAIRS.format(package=str(_PACKAGE))
        own = {key: value for key, value in environment.items() if not key.startswith("TRAINFIX")}
        own |= {"TRAINFIX": "on" if repairs else "off", "TRAINFIX_QUIET": "1"}
        # The experiments are made for the CPU. A process that was forked could not use a GPU anyway.
        own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        self.repairs = repairs
        self._command, self._environment = [python, "-c", code], own
        self._process: subprocess.Popen[bytes] | None = None
        self._said = Path(folder, f"{'with' if repairs else 'without'}-repairs")
        self._received = b""

    def ask(self, advisory: Any) -> None:
        """Start the experiment of `advisory`; `answer` waits for what it says."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        repair = advisory.id if self.repairs else None
        request = {"package": advisory.package, "proof": advisory.proof, "repair": repair}
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` finds out how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, deadline: float, overdue: str) -> Outcome:
        """What the experiment said until `deadline` (of time.monotonic), else `overdue` as the problem."""
        line = self._line(deadline)
        if line is None:
            self.stop()
            return Outcome(None, overdue)
        if not line:
            return self._ended()
        done = json.loads(line)
        if done["code"] or not done["out"]:
            return Outcome(None, f"the child ended with {done['code']}: {done['err'] or 'it printed nothing'}")
        return Outcome(json.loads(done["out"]))

    def stop(self) -> None:
        """Kill it and everything that it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process, self._received = None, b""

    def _start(self) -> None:
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )

    def _line(self, deadline: float) -> bytes | None:
        """The next line of its stdout, empty when it has ended, None when the time is over."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                return None
            received = os.read(pipe, 1 << 16)
            if not received:
                return b""
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _ended(self) -> Outcome:
        """The interpreter itself has ended, and with it the experiment."""
        assert self._process is not None
        code = self._process.wait()
        lines = [line.strip() for line in self._said.read_text(errors="replace").splitlines() if line.strip()]
        self.stop()
        return Outcome(None, f"the child ended with {code}: {lines[-1] if lines else 'it printed nothing'}")
