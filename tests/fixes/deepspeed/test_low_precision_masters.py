"""TF-0001 and TF-0003 with low-precision master weights: the sums themselves are then in bf16 or fp16.

One release for each shape of the faulty function. They need DeepSpeed's compiled Adam, which is built once per release
(g++ and ninja, one to two minutes) and kept in the user's cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.fixes.deepspeed import tables
from tests.fixes.deepspeed.judging import assert_loses, assert_same_bits, coefficients, windows
from tests.support.releases import cache_folder

pytestmark = pytest.mark.slow

DTYPES = {"0.15.2": ("fp16",), "0.18.9": ("fp16", "bf16")}  # 0.18.3 brought bf16
MASTERS = [(version, dtype) for version, dtypes in DTYPES.items() for dtype in dtypes]
ROUNDING = {"fp16": 2e-3, "bf16": 1e-2}  # relative: what a sum of eight costs in that type


@pytest.fixture
def ran(runs, version):
    """The results without trainfix, and with it."""
    environment = {
        "TORCH_EXTENSIONS_DIR": str(cache_folder().parent / "extensions" / f"deepspeed-{version}"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja is beside python
    }
    table = tables.low_precision_masters(*DTYPES[version])
    return [runs(version, table, trainfix=on, timeout=900.0, env=environment) for on in (False, True)]


@pytest.mark.parametrize(("version", "dtype"), MASTERS)
@pytest.mark.parametrize("name", tables.MASTERS_LOSING)
def test_low_precision_masters_lose_micro_batches_and_keep_all_with_trainfix(ran, dtype, name):
    unpatched, repaired = (results[f"{dtype}, {name}"] for results in ran)
    count = len(windows(repaired)[0]["coefficients"])
    assert_loses(unpatched, [int("engine of one" not in name), *[0] * (count - 2), 1])
    for window in windows(repaired):
        assert coefficients(window) == pytest.approx([1] * count, abs=2e-2)
        assert window["captured"]["relative_error"] < ROUNDING[dtype]
        assert window["global_norm_ratio"] == pytest.approx(1, abs=ROUNDING[dtype])
        assert window["safe_norm_ratio"] == pytest.approx(window["global_norm_ratio"], rel=1e-4)


@pytest.mark.parametrize(("version", "dtype"), MASTERS)
@pytest.mark.parametrize("name", tables.MASTERS_HANDED_OVER)
def test_what_low_precision_masters_do_right_stays_the_same_bit_for_bit(ran, dtype, name):
    unpatched, repaired = (results[f"{dtype}, {name}"] for results in ran)
    assert_same_bits(unpatched, repaired)
