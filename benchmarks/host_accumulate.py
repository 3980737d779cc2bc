"""Adding bf16 gradients to a float32 master gradient on the host: the compiled loop, chunks of torch, and plain torch.

    PYTHONPATH=. .venv/bin/python benchmarks/host_accumulate.py [--elements N]... [--rounds N] [--quick] [-o FILE]

Every way is timed in turns in this process, on one thread, and first checked: those that sum in float32 must give the
same bits. `ratio` is time / time of the base (the compiled loop; the chunks where no C compiler is at hand), with its
95% confidence interval. `gigabytes_per_second` counts the bytes that the operation needs: those that one pass would
read and write, whatever the way really moves. The compiled loop is the installed trainfix-native, else built from
native/ into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import environment, interleaved
from tests.gradcopy.native import building
from trainfix.gradcopy import native
from trainfix.gradcopy.arithmetic import CHUNK_ELEMENTS, TorchAdder
from trainfix.gradcopy.segments import Adder, Segment

RESULT = Path(__file__).resolve().parent / "results" / "host_accumulate.json"
ELEMENTS = [1_000_000, 30_000_000, 100_000_000]
QUICK = [1_000_000]

# Bytes per element that one pass needs: read the gradient, read and write what it is added to.
INTO_FLOAT32 = 2 + 4 + 4
INTO_BF16 = 2 + 2 + 2
COPY_FLOAT32 = 4 + 4


class Way(NamedTuple):
    """One way to do it. squares: takes the sum of squares as well."""

    work: Callable[[], object]
    bytes_per_element: int
    squares: bool


def compiled_loop(folder: Path) -> Adder | None:
    """The installed one, else one built into `folder`; None, with a word on stderr, where neither is possible."""
    installed = native.adder()
    missing = building.lacks()
    if installed is not None or missing is not None:
        if installed is None:
            print(f"without the compiled loop: {missing}", file=sys.stderr)
        return installed
    with building.found(building.build(folder)):
        return native.adder()


def ways(elements: int, loop: Adder | None) -> dict[str, Way]:
    """Each works on the same master and the same gradient, so that all find the caches alike."""
    master, gradient = torch.randn(elements), torch.randn(elements).bfloat16()
    other, narrow = torch.empty(elements), gradient.clone()
    segments, sums = [Segment(0, master, gradient, False)], torch.zeros(1, dtype=torch.float64)
    chunks = TorchAdder()

    def plain_and_norm() -> torch.Tensor:
        master.add_(gradient)
        return master.double().norm()

    found = {}
    if loop is not None:
        found["compiled loop"] = Way(lambda: loop.add(segments, None), INTO_FLOAT32, False)
        found["compiled loop, squares"] = Way(lambda: loop.add(segments, sums), INTO_FLOAT32, True)
    return found | {
        "torch in chunks": Way(lambda: chunks.add(segments, None), INTO_FLOAT32, False),
        "torch in chunks, squares": Way(lambda: chunks.add(segments, sums), INTO_FLOAT32, True),
        "master.add_(gradient)": Way(lambda: master.add_(gradient), INTO_FLOAT32, False),
        "master.add_(gradient.float())": Way(lambda: master.add_(gradient.float()), INTO_FLOAT32, False),
        "master.add_(gradient), master.double().norm()": Way(plain_and_norm, INTO_FLOAT32, True),
        "bf16 += bf16": Way(lambda: narrow.add_(gradient), INTO_BF16, False),
        "copy of the master": Way(lambda: other.copy_(master), COPY_FLOAT32, False),
    }


def same_bits(loop: Adder | None, elements: int = CHUNK_ELEMENTS + 12_345) -> None:
    """Raises AssertionError unless every way that sums in float32 gives the same master gradient."""
    before, gradient = torch.randn(elements), torch.randn(elements).bfloat16()
    wanted = before + gradient.float()
    for adder in [TorchAdder(), *([] if loop is None else [loop])]:
        master, squares = before.clone(), torch.zeros(1, dtype=torch.float64)
        adder.add([Segment(0, master, gradient, False)], squares)
        assert torch.equal(master, wanted)
        torch.testing.assert_close(squares[0], wanted.double().square().sum(), rtol=1e-12, atol=0)
    assert torch.equal(before.clone().add_(gradient), wanted)


def measured(elements: int, rounds: int, loop: Adder | None) -> dict[str, Any]:
    """The table of one size."""
    all_ways = ways(elements, loop)
    base = next(iter(all_ways))
    times = interleaved({name: way.work for name, way in all_ways.items()}, base=base, rounds=rounds)
    for name, way in all_ways.items():
        needed = way.bytes_per_element * elements
        speed = round(needed / times[name]["seconds"] / 1e9, 2)
        times[name] |= {
            "gigabytes_per_second": speed,
            "bytes_per_element": way.bytes_per_element,
            "squares": way.squares,
        }
    return {"elements": elements, "base": base, "rounds": rounds, "ways": times}


def show(table: dict[str, Any]) -> None:
    print(f"\n{table['elements']:,} elements, time / {table['base']} [95% interval], GB/s")
    for name, row in table["ways"].items():
        low, high = row["interval"]
        print(f"  {name:46} {row['ratio']:6.2f}  [{low:.2f}, {high:.2f}]  {row['gigabytes_per_second']:6.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, action="append", help="a size; may be given several times")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    sizes, rounds = (QUICK, 7) if options.quick else (ELEMENTS, 25)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        loop = compiled_loop(Path(folder))
        same_bits(loop)
        found = environment() | {"chunk_elements": CHUNK_ELEMENTS}
        tables = []
        for elements in options.elements or sizes:
            tables.append(measured(elements, options.rounds or rounds, loop))
            show(tables[-1])
    options.output.write_text(json.dumps({"environment": found, "sizes": tables}, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
