"""Writes what `make demo` prints into README.md, between its demo markers.

Run it after `make demo` in a fresh clone: after `make test` the demo finds the trainers that the tests install, too.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
README = CHECKOUT / "README.md"
BLOCK = re.compile(r"(?<=<!-- demo:begin -->\n).*?(?=<!-- demo:end -->)", re.S)


def main() -> None:
    """Run the demo and replace the block."""
    command = [str(CHECKOUT / ".venv" / "demo" / "bin" / "python"), "demo/run.py"]
    shown = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True).stdout
    block = f"```console\n$ make demo\n{shown}```\n"
    README.write_text(BLOCK.sub(lambda _: block, README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
