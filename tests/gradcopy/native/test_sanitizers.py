"""Under the address and undefined-behaviour sanitizers the loop touches what it was given, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gradcopy.native import building

pytestmark = pytest.mark.slow

# Calls the loop on memory of exactly the size it is told of; with TOO_FAR one element less than that. No torch: its
# own libraries would be examined as well.
CALLS = """
import ctypes, itertools, sys
library, too_far = sys.argv[1], int(sys.argv[2])
add = ctypes.CDLL(library).trainfix_native_add
add.argtypes = 2 * [ctypes.c_void_p] + [ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
allocate, release = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
allocate.restype, allocate.argtypes, release.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
square = ctypes.c_double()
for count, dtype, first, take, odd in itertools.product(
    [0, 1, 7, 15, 16, 17, 33, 4095, 4096, 4097, 8209], [0, 1, 2], [0, 1], [0, 1], [0, 1, 2]
):
    width = 2 if dtype else 4
    to, start = allocate(4 * count + odd), allocate(width * count + odd)
    for pattern in (0x00, 0x7F, 0xFF):  # numbers, the largest, not a number
        ctypes.memset(to, pattern, 4 * count + odd)
        ctypes.memset(start, pattern, width * count + odd)
        assert add(to + odd, start + odd, count + too_far, dtype, first, ctypes.byref(square) if take else None) == 0
    release(to)
    release(start)
assert add(None, None, 0, 3, 0, None) == -1
print("done")
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The loop built with both sanitizers, and the library that must be loaded before it."""
    missing, compiler = building.lacks(), building.compiler()
    if missing or compiler is None:
        pytest.skip(missing or "no C compiler")
    asked = [*compiler, "-print-file-name=libasan.so"]
    runtime = Path(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("this compiler has no address sanitizer that can be loaded first")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    (library,) = building.build(tmp_path_factory.mktemp("watched"), *flags).glob("trainfix_native/_loop*.so")
    return library, runtime


def run(watched: tuple[Path, Path], too_far: int) -> subprocess.CompletedProcess[str]:
    library, runtime = watched
    environment = os.environ | {"LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-S", "-c", CALLS, str(library), str(too_far)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_loop_stays_within_what_it_is_given(watched: tuple[Path, Path]) -> None:
    done = run(watched, 0)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_the_sanitizers_see_one_element_too_many(watched: tuple[Path, Path]) -> None:
    done = run(watched, 1)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
