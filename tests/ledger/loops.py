"""The child's program for TF-0601: torchao's own optimizer, with streams that do nothing."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from types import ModuleType
from typing import Any

from tests.support import stacks


def main() -> None:
    importlib.import_module("trainfix")
    untouched = ModuleType("untouched")  # the proof, without trainfix's activating __init__
    untouched.__path__ = [str(stacks.SOURCE / "trainfix")]
    sys.modules["untouched"] = untouched
    proof: Any = importlib.import_module("untouched.proofs.tf_0601")
    asked = json.loads(sys.argv[1])
    print(json.dumps([asdict(window) for window in proof.train(proof.MODULE, asked["micro_batches"])]))


if __name__ == "__main__":
    main()
