"""One rank of a run on a real DeepSpeed, started by whoever starts ranks: ZeRO-2 with offload, four micro-batches.

As a program it prints what `train` gives. The launcher sets RANK, WORLD_SIZE and the rest; ODD_RANK is the rank that
has TRAINFIX=off, ANSWER_FOLDER the folder that gets ``rank<N>.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 4
"""How long ranks wait for the odd one, instead of a minute."""


def train() -> dict[str, Any]:
    """The micro-batch coefficients of one window, or the error; `trainfix` is never imported by this script."""
    from tests.support import experiment

    untouched = sys.modules["untouched"] = ModuleType("untouched")
    untouched.__path__ = [str(experiment.SOURCE / "trainfix")]
    deepspeed = experiment._start()
    agreement = sys.modules.get("trainfix.engine.agreement")
    if agreement is not None and "ODD_RANK" in os.environ:
        agreement.TIMEOUT_SECONDS = SECONDS  # type: ignore[attr-defined]
    answer: dict[str, Any] = {"rank": int(os.environ["RANK"]), "active": agreement is not None, "error": None}
    try:
        trial = experiment.Trial(deepspeed, experiment.Configuration(ga=4))
        answer["coefficients"] = [round(value, 3) for value in trial.window()["coefficients"]]
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    return answer


def main() -> None:
    """Train, and write down the answer."""
    if os.environ["RANK"] == os.environ.get("ODD_RANK"):
        os.environ["TRAINFIX"] = "off"
    answer = train()
    Path(os.environ["ANSWER_FOLDER"], f"rank{answer['rank']}.json").write_text(json.dumps(answer))
    os._exit(1 if answer["error"] else 0)  # tearing gloo down can abort a process that has already answered


if __name__ == "__main__":
    main()
