"""What a kernel's machine code takes: registers, spills, and how wide its loads and stores are."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path


def resources(cubin: Path, tools: Path) -> dict[str, int | dict[str, int]]:
    """registers, and stack and local (bytes; spilled registers would lie there), as cuobjdump has them.

    flushes: instructions that take subnormals for zero. accesses: how often each width of a load or a store of global
    or local memory stands there, in bits: {"LDG.128": 6, ...}.
    """
    usage = _output(tools / "cuobjdump", "-res-usage", cubin)
    counts = {word: int(number) for word, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = _output(tools / "nvdisasm", "-c", cubin)
    accesses = Counter(f"{kind}.{_width(rest)}" for kind, rest in re.findall(r"\b(LDG|STG|LDL|STL)\b([.\w]*)", code))
    return {
        "registers": counts["REG"],
        "stack": counts["STACK"],
        "local": counts["LOCAL"],
        "flushes": len(re.findall(r"\.FTZ\b", code)),
        "accesses": dict(accesses),
    }


def _width(modifiers: str) -> str:
    found = re.search(r"\.(?:[US])?(8|16|64|128)\b", modifiers)
    return found[1] if found else "32"


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
