"""What an audited step costs more than one that is not audited, and how much memory the ledger keeps meanwhile.

    PYTHONPATH=. python benchmarks/ledger.py [--rounds 7] [--quick] [--json FILE]

Windows of four micro-batches of a Llama on the CPU, audited and not, in turns in one process. `ratio` is the median
over rounds of time(audited) / time(not), which holds everything but is as uneven as the machine; `share` is what the
ledger's hooks take of an audited window, without what begins and ends a ledger once; `more_bytes_at_the_peak` is the
difference of what the CPU allocator had given out at most inside a window, which is counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trainfix
from benchmarks.timing import environment, interleaved, seconds
from trainfix.ledger.capture import Capture
from trainfix.ledger.tokens import Tokens
from trainfix.ledger.watch import Watch

STEPS = 4
SIZES = {
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
    "larger": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6},
}
RUNS = {"small": (SIZES["small"], 2, 512), "larger": (SIZES["larger"], 1, 512)}  # rows and positions of a micro-batch
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


class Loop:
    """A training loop, window by window."""

    def __init__(self, sizes: dict[str, int], rows: int, length: int) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **HEADS, max_position_embeddings=length))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ids = torch.randint(sizes["vocab_size"], (STEPS, rows, length))

    def window(self) -> None:
        for ids in self.ids:
            (self.model(input_ids=ids, labels=ids).loss / STEPS).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def audited(self) -> None:
        """A window, with all that begins and ends its audit."""
        with trainfix.ledger(self.model, self.optimizer):
            self.window()


OWN = (
    (Watch, ("_called", "_stepping")),
    (Capture, ("_arrived",)),
    (Tokens, ("_embedding", "_inputs", "_body", "_head", "_called", "_returned", "_came_back")),
)


@contextmanager
def own_seconds() -> Iterator[list[float]]:
    """The seconds that are spent inside the ledger's own code meanwhile, call by call."""
    spent: list[float] = []

    def timed(method: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **named)
            finally:
                spent.append(time.perf_counter() - begin)

        return run

    before = [(kind, name, getattr(kind, name)) for kind, names in OWN for name in names]
    for kind, name, method in before:
        setattr(kind, name, timed(method))
    try:
        yield spent
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


def share(loop: Loop, rounds: int) -> float:
    with own_seconds() as spent:
        total = sum(seconds(loop.audited) for _ in range(rounds))
    return round(sum(spent) / total, 3)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator had given out at a time, above what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results
    held = itertools.accumulate(event.nbytes() for event in results.events() if event.name() == "[memory]")
    return max(held, default=0)


def measure(sizes: dict[str, int], rows: int, length: int, rounds: int) -> dict[str, Any]:
    loop = Loop(sizes, rows, length)
    times = interleaved({"not": loop.window, "audited": loop.audited}, base="not", rounds=rounds)
    return {
        "model": sizes,
        "tokens_of_a_micro_batch": rows * length,
        "ratio": times["audited"]["ratio"],
        "interval": times["audited"]["interval"],
        "share": share(loop, rounds),
        "seconds": times["not"]["seconds"],
        "more_bytes_at_the_peak": peak(loop.audited) - peak(loop.window),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the small model only")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    logging.getLogger("trainfix").addHandler(logging.NullHandler())  # its verdicts are not what is looked at here
    names = ["small"] if options.quick else list(SIZES)
    result = {"environment": environment(), **{name: measure(*RUNS[name], options.rounds) for name in names}}
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
