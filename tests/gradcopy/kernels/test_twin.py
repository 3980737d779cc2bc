"""The CUDA C++ kernel: on threads of the host against torch, and compiled where there is an nvcc."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gradcopy.kernels.emulated import ERRORS
from tests.support.stacks import environment
from trainfix.gradcopy.kernels.twin import source, variant

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_the_kernel_is_part_of_the_package_and_every_variant_has_its_own_text():
    texts = {
        source(variant(dtype, first=first, aligned=aligned, squares=squares))
        for dtype, first, aligned, squares in itertools.product(DTYPES, *[(True, False)] * 3)
    }
    assert len(texts) == 24


def test_the_kernel_needs_no_header():
    assert "#include" not in source(variant(torch.bfloat16, first=True, aligned=True, squares=True))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH to compile bucket.cu for the host")
    command = [sys.executable, "-m", "tests.gradcopy.kernels.emulated", str(tmp_path_factory.mktemp("emulated"))]
    done = subprocess.run(command, env=environment(trainfix=False), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_kernel_gives_torchs_bits_in_as_few_launches_as_promised(emulated):
    assert emulated["unchanged"] == []


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_kernel_would_be_seen(emulated, error):
    assert emulated[error]


def nvcc():
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    return found or pytest.skip("no nvcc on PATH or in CUDA_HOME")


# 16-byte loads and stores of a thread, which has 16 elements of an aligned row.
COMPILED = [
    (torch.bfloat16, True, 2 + 4, 4),
    (torch.float16, True, 2 + 4, 4),
    (torch.float32, True, 4 + 4, 4),
    (torch.bfloat16, False, 0, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("dtype", "aligned", "loads", "stores"), COMPILED)
def test_compiled_it_spills_nothing_and_moves_16_bytes_at_a_time(capability, dtype, aligned, loads, stores, tmp_path):
    file = tmp_path / "bucket.cu"
    file.write_text(source(variant(dtype, first=False, aligned=aligned, squares=True)), encoding="utf-8")
    options = [f"-arch={capability}", "-Xptxas=-v", "-Werror=all-warnings", f"--keep-dir={tmp_path}", "--keep"]
    command = [nvcc(), "-cubin", *options, str(file), "-o", str(tmp_path / "bucket.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert int(re.search(r"Used (\d+) registers", done.stderr)[1]) <= 64
    assembly = (tmp_path / "bucket.ptx").read_text(encoding="utf-8")
    assert len(re.findall(r"\bld\.global(?:\.nc)?\.v4\.[a-z]32\b", assembly)) == loads
    assert len(re.findall(r"\bst\.global\.v4\.[a-z]32\b", assembly)) == stores
    assert ".ftz" not in assembly
