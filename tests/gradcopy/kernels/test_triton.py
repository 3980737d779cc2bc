"""The Triton kernel: in Triton's interpreter against torch, and compiled for GPUs that need not be here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.gradcopy.kernels.interpreted import ERRORS
from tests.support.stacks import environment, stack

pytestmark = pytest.mark.slow

TRITON = {"triton": "3.6.0"}
NUMPY = {"numpy": "2.3.5"}  # the interpreter of this triton fails with 2.4


def child(module, *arguments, packages, variables):
    command = [sys.executable, "-m", f"tests.gradcopy.kernels.{module}", *map(str, arguments)]
    with_packages = environment(*stack(**packages), trainfix=False) | variables
    done = subprocess.run(command, env=with_packages, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    return child("interpreted", folder, packages=TRITON | NUMPY, variables={"TRITON_INTERPRET": "1"})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    return child("compiled", packages=TRITON, variables=cache)


def test_the_kernel_gives_torchs_bits_in_as_few_launches_as_promised(interpreted):
    assert interpreted["unchanged"] == []


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_kernel_would_be_seen(interpreted, error):
    assert interpreted[error]


@pytest.fixture(params=["sm_80", "sm_90"])
def machine_code(request, compiled):
    found = {name: one for name, one in compiled.items() if name.startswith(request.param)}
    assert len(found) == 6
    return found


def test_no_register_is_spilled(machine_code):
    assert {(one["stack"], one["local"]) for one in machine_code.values()} == {(0, 0)}
    assert not [name for one in machine_code.values() for name in one["accesses"] if name.startswith(("LDL", "STL"))]


def test_subnormals_are_kept(machine_code):
    assert {one["flushes"] for one in machine_code.values()} == {0}


def test_four_blocks_of_256_threads_find_registers_on_a_multiprocessor(machine_code):
    """It has 65,536."""
    assert max(one["registers"] for one in machine_code.values()) <= 65536 // (4 * 256)


def test_aligned_rows_move_16_bytes_at_a_time(machine_code):
    """A thread has 16 elements. The rest are the row's numbers in the table, and its sum of squares."""
    assert loads_and_stores(machine_code, "bf16 aligned later squares") == (2 + 4, 4)
    assert loads_and_stores(machine_code, "fp16 aligned later squares") == (2 + 4, 4)
    assert loads_and_stores(machine_code, "fp32 aligned later squares") == (4 + 4, 4)
    assert loads_and_stores(machine_code, "bf16 aligned first no squares") == (2, 4)
    for name, one in machine_code.items():
        if "aligned" in name:
            assert not {"LDG.8", "LDG.16", "LDG.32", "STG.8", "STG.16", "STG.32"} & set(one["accesses"]), name


def loads_and_stores(machine_code, variant):
    (one,) = (one for name, one in machine_code.items() if name.endswith(variant))
    return one["accesses"]["LDG.128"], one["accesses"]["STG.128"]


def test_the_unaligned_rest_is_not_read_16_bytes_at_a_time(machine_code):
    for name, one in machine_code.items():
        assert ("LDG.128" in one["accesses"]) is ("aligned" in name), name


def test_the_number_of_rows_makes_no_other_kernel(compiled):
    """First or later, with squares or without: four, whatever the sizes."""
    assert compiled["kernels of a run"] == 4
