"""What it costs to know a window's tokens before its first backward (TF-0401), as a part of the optimizer step.

    python benchmarks/loss_lookahead.py [--transformers 4.45.2] [--rounds 5] [--quick] [--json FILE]

For 1 rank and 2 ranks (gloo), for a tiny model and a larger one, transformers' Trainer trains with trainfix's repair
and without it, in turns in one process. Printed are `share`, the time inside what the repair adds (counting tokens, the
all-reduce, weighing the losses) over the time of the steps, and `ratio`, the median over rounds of time(with) /
time(without), which holds everything but is as uneven as the machine. The all-reduce of 2 ranks also holds the wait for
the slower one, which would otherwise wait at the gradients; `share_without_wait` takes the thread's CPU time instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, WINDOWS = 4, 3
# name -> (changes to the tiny Llama, trained tokens of the rows)
MODELS: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "tiny": ({}, (2, 60, 30, 7)),
    "larger": (
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        (40, 250, 130, 60),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", default="4.45.2", help="a release that trainfix looks ahead for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the tiny model only")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(options)
    result = {
        "runs": [run for ranks in (1, 2) for run in _measured(options, ranks)],
        "steps": STEPS,
        "windows": WINDOWS,
        "rounds": options.rounds,
        "date": date.today().isoformat(),
        "transformers": options.transformers,
        "python": platform.python_version(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used by each rank",
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores, times say little
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _measured(options: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    """Start the ranks, and return what the first one measured."""
    sys.path.insert(0, str(ROOT))
    from tests.support.stacks import environment, stack

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment(*stack(transformers=options.transformers), trainfix=True) | {"TRAINFIX_QUIET": "1"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    groups = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", *sys.argv[1:]],
            env=shared | (place | groups if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    out, *_ = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"a rank ended with {[child.returncode for child in children]}")
    runs: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return runs


def _child(options: argparse.Namespace) -> None:
    import torch

    import trainfix

    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    runs = []
    for name, (changes, lengths) in MODELS.items():
        if options.quick and name != "tiny":
            continue
        train = _training(changes, lengths, ranks)
        train()  # warm up, and let the repair be put in place
        ratios, shares, own_shares = [], list[float](), list[float]()
        for _ in range(options.rounds):
            with _timing_of_ours() as ours:
                wall = _seconds(train)
            shares.append(ours["wall"] / wall)
            own_shares.append(ours["cpu"] / wall)
            trainfix.revert("TF-0401")
            ratios.append(wall / _seconds(train))
            trainfix.apply("TF-0401")
        runs.append(
            {
                "model": name,
                "ranks": ranks,
                "seconds_per_step": round(wall / WINDOWS, 4),
                "share": round(statistics.median(shares), 5),
                "share_without_wait": round(statistics.median(own_shares), 5),
                "ratio": round(statistics.median(ratios), 3),
                "calls_per_step": {what: round(ours[what] / WINDOWS, 2) for what in ("count", "add up", "weigh")},
            }
        )
    print(json.dumps(runs), flush=True)
    os._exit(0)  # tearing gloo down can abort a process that has already answered


def _training(changes: dict[str, int], lengths: tuple[int, ...], ranks: int) -> Callable[[], None]:
    """A function that trains for `WINDOWS` optimizer steps."""
    import transformers

    from trainfix.proofs import token_experiment as tokens

    model = tokens.tiny_llama(**changes)
    data = tokens.answers(ranks * STEPS * WINDOWS, lengths=lengths)

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=STEPS,
                num_train_epochs=1,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                ddp_backend="gloo" if ranks > 1 else None,
            )
            transformers.Trainer(
                model=model, args=arguments, train_dataset=tokens.Rows(data), data_collator=tokens.collate
            ).train()

    return train


def _seconds(work: Callable[[], None]) -> float:
    """The wall-clock seconds of the training loop within `work`."""
    from transformers import Trainer

    loop = Trainer.__dict__["train"]
    spent = [0.0]

    def timed(self: Any, *args: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return loop(self, *args, **named)
        finally:
            spent[0] = time.perf_counter() - begin

    Trainer.train = timed
    try:
        work()
    finally:
        Trainer.train = loop
    return spent[0]


@contextmanager
def _timing_of_ours() -> Iterator[Counter[str]]:
    """The seconds (`wall`, `cpu`) and the calls of what the repair adds."""
    from trainfix.fixes import token_weighting
    from trainfix.fixes.transformers.ahead import Training

    spent: Counter[str] = Counter()
    places = [
        (token_weighting, "trained", "count"),
        (token_weighting, "over_ranks", "add up"),
        (Training, "weigh", "weigh"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]

    def timing(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **named)
            finally:
                spent["cpu"] += time.thread_time() - cpu  # type: ignore[assignment]
                spent["wall"] += time.perf_counter() - wall  # type: ignore[assignment]
                spent[what] += 1

        return call

    for owner, name, what in places:
        setattr(owner, name, timing(getattr(owner, name), what))
    try:
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
