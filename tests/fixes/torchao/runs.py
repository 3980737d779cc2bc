"""What a child does: runs of torchao's CPUOffloadOptimizer, each a word of operations, and what became of them.

``b`` backward, ``1`` and ``2`` one that reaches the first or the second layer alone, ``s`` step, ``z`` zero_grad of the
optimizer, ``m`` of the model, ``r`` trainfix.revert(). The hooks are torchao's own; see trainfix.proofs.tf_0601.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support import stacks

Result = dict[str, Any]


def run(
    folder: Path, module: str, words: Mapping[str, Mapping[str, Any]], *, trainfix: bool = True, **env: str
) -> tuple[dict[str, Result], str]:
    """The result of each run (name -> word and options of the optimizer), and what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixes.torchao.runs", module, json.dumps(words), str(int(trainfix))],
        env=stacks.environment(folder, trainfix=trainfix) | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Result] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


def main(module: str, words: Mapping[str, Mapping[str, Any]], with_trainfix: bool) -> dict[str, Result]:
    if with_trainfix:
        importlib.import_module("trainfix")
    untouched = ModuleType("untouched")  # trainfix's own modules under another name, without its activating __init__
    untouched.__path__ = [str(stacks.SOURCE / "trainfix")]
    sys.modules["untouched"] = untouched
    proof: Any = importlib.import_module("untouched.proofs.tf_0601")
    return {name: _run(proof, module, **run) for name, run in words.items()}


def _run(proof: Any, module: str, word: str, **options: Any) -> Result:
    import torch

    model = proof.network()
    optimizer = proof.on_cpu(module)(model.parameters(), torch.optim.SGD, **{"offload_gradients": True, **options})
    consumed: dict[int, torch.Tensor] = {}
    proof.watch(optimizer, consumed)
    result: Result = {"error": None, "advisory": None, "done": ""}
    try:
        for number, letter in enumerate(word):
            _operate(letter, proof, model, optimizer, number)
            result["done"] += letter
    except RuntimeError as error:
        result |= {"error": f"{type(error).__name__}: {error}", "advisory": getattr(error, "advisory", None)}
    host = [own.param_groups[0]["params"][0].grad for own in optimizer.optim_dict.values()]
    result["host"] = _sha(host)
    result["parameters"] = _sha([parameter.detach() for parameter in model.parameters()])
    result["consumed"] = _sha([consumed[place] for place in sorted(consumed)])
    hooks = [hook for parameter in model.parameters() for hook in parameter._post_accumulate_grad_hooks.values()]
    result["hooks"] = [hook.__module__ for hook in hooks]
    if "trainfix" in sys.modules:
        records = sys.modules["trainfix"].status()
        result["states"] = {one.id: one.state for one in records if one.package == "torchao"}
    return result


def _operate(letter: str, proof: Any, model: Any, optimizer: Any, number: int) -> None:
    if letter == "s":
        optimizer.step()
    elif letter == "z":
        optimizer.zero_grad()
    elif letter == "m":
        model.zero_grad()
    elif letter == "r":
        sys.modules["trainfix"].revert()
    else:
        first, second = model[0].weight, model[2].weight
        first.requires_grad_(letter != "2")
        second.requires_grad_(letter != "1")
        proof.loss_of(model, number).backward()


def _sha(tensors: list[Any]) -> str:
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in tensors)).hexdigest()[:16]


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "1")), file=out)
