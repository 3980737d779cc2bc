"""What `make demo` shows, with the packages of the environment that runs it: diagnosis, proof, picture.

Writes demo/output/TF-0001.json (what `trainfix prove` measured) and demo/output/TF-0001.png (drawn from it).
The experiment runs once: its report is written as JSON, and the text that the command prints is rendered from that.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from picture import draw

from trainfix.cli.proof_text import prove_text

CHECKOUT = Path(__file__).resolve().parent.parent
REPORT, PICTURE = Path("demo/output/TF-0001.json"), Path("demo/output/TF-0001.png")
# Each command with the exit code that DeepSpeed 0.18.9 must give: doctor finds the error, prove shows it repaired.
DOCTOR = ("trainfix doctor --config demo/ds_zero2_offload.json", 1)
PROVE = ("trainfix prove TF-0001", 0)


def run(command: str, expected: int, *more: str) -> None:
    """Show a command, run it with what `more` adds; end the demo when its exit code is not the expected one."""
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    executable = Path(sys.executable).with_name(program)
    code = subprocess.run([str(executable), *arguments, *more], cwd=CHECKOUT, check=False).returncode
    if code != expected:
        sys.exit(f"demo: `{command}` exited with {code}, where {expected} was expected")


def main() -> None:
    """Show the two commands, then draw what the second one measured."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    (CHECKOUT / REPORT).parent.mkdir(parents=True, exist_ok=True)
    run(*DOCTOR)
    print(f"(exit code {DOCTOR[1]}, as expected)\n", flush=True)
    run(*PROVE, "--format", "json", "-o", str(REPORT))
    report = json.loads((CHECKOUT / REPORT).read_text(encoding="utf-8"))
    print(prove_text(report["proofs"], report["exit"], colour=False), end="")
    print(f"(exit code {PROVE[1]}, as expected)\n")
    draw(CHECKOUT / REPORT, CHECKOUT / PICTURE)
    print(f"picture: {PICTURE}, drawn from {REPORT}")


if __name__ == "__main__":
    main()
