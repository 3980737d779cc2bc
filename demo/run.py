"""What `make demo` shows, with the packages of the environment that runs it: diagnosis, proof, picture.

Writes demo/output/TF-0001.json (what `trainfix prove` measured) and demo/output/TF-0001.png (drawn from it).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from picture import draw

CHECKOUT = Path(__file__).resolve().parent.parent
REPORT, PICTURE = Path("demo/output/TF-0001.json"), Path("demo/output/TF-0001.png")
# Each command with the exit code that DeepSpeed 0.18.9 must give: doctor finds the error, prove shows it repaired.
DOCTOR = ("trainfix doctor --config demo/ds_zero2_offload.json", 1)
PROVE = ("trainfix prove TF-0001", 0)
RECORD = (f"trainfix prove TF-0001 --format json -o {REPORT}", 0)


def run(command: str, expected: int) -> None:
    """Run a command of this environment; end the demo when its exit code is not the expected one."""
    program, *arguments = shlex.split(command)
    executable = Path(sys.executable).with_name(program)
    code = subprocess.run([str(executable), *arguments], cwd=CHECKOUT, check=False).returncode
    if code != expected:
        sys.exit(f"demo: `{command}` exited with {code}, where {expected} was expected")


def main() -> None:
    """Show the two commands, then record what the second one measures and draw it."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for command, expected in (DOCTOR, PROVE):
        print(f"$ {command}", flush=True)
        run(command, expected)
        print(f"(exit code {expected}, as expected)\n", flush=True)
    (CHECKOUT / REPORT).parent.mkdir(parents=True, exist_ok=True)
    run(*RECORD)
    draw(CHECKOUT / REPORT, CHECKOUT / PICTURE)
    print(f"picture: {PICTURE}, drawn from {REPORT}")


if __name__ == "__main__":
    main()
