"""How the compiled loop is found, and what it is handed."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gradcopy.native import building
from trainfix.gradcopy import native
from trainfix.gradcopy.segments import Segment


def package(folder: Path, source: str | None) -> Path:
    """A package `trainfix_native` whose `_loop` is this C source compiled, or a file that is no library."""
    inside = folder / "trainfix_native"
    inside.mkdir()
    (inside / "__init__.py").touch()
    library = inside / "_loop.abi3.so"
    if source is None:
        library.write_text("not a library")
        return folder
    compiler = building.compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    command = [*compiler, "-shared", "-fPIC", "-xc", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    return folder


def test_where_it_is_not_installed_there_is_no_adder_and_no_word(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trainfix_native", None)
    assert native.adder() is None
    assert caplog.messages == []


def test_a_package_without_the_extension_gives_no_adder(tmp_path):
    folder = package(tmp_path, None)
    (folder / "trainfix_native" / "_loop.abi3.so").unlink()
    with building.found(folder):
        assert native.adder() is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int trainfix_native_abi(void) { return 99; }", "it is of ABI 99, this release of trainfix calls ABI 1"),
        ("int something_else(void) { return 0; }", "trainfix_native_abi"),
        (None, "_loop.abi3.so"),
    ],
    ids=["another ABI", "without an ABI", "no library"],
)
def test_what_cannot_be_called_gives_no_adder_and_says_why(tmp_path, caplog, source, reason):
    with building.found(package(tmp_path, source)), caplog.at_level(logging.WARNING, "trainfix"):
        assert native.adder() is None
    (message,) = caplog.messages
    assert message.startswith("trainfix-native is not used, torch adds instead: ")
    assert reason in message


def test_finding_it_does_not_run_the_extension_as_a_module(built):
    with building.found(built):
        assert native.adder() is not None
        assert "trainfix_native._loop" not in sys.modules


def test_each_segment_has_its_own_sum(adder):
    first, second = torch.empty(3), torch.ones(2)
    segments = [
        Segment(1, first, torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), True),
        Segment(2, torch.empty(0), torch.empty(0), True),
        Segment(3, second, torch.ones(2, dtype=torch.float16), False),
    ]
    assert adder.parts(segments) == [1, 1, 1]
    squares = torch.full((3,), -1.0, dtype=torch.float64)
    adder.add(segments, squares)
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [2, 2])
    assert squares.tolist() == [14, 0, 8]


def test_without_squares_the_sums_are_the_same(adder):
    before, gradient = torch.randn(5000), torch.randn(5000).bfloat16()
    with_squares, without = before.clone(), before.clone()
    adder.add([Segment(0, with_squares, gradient, False)], torch.zeros(1, dtype=torch.float64))
    adder.add([Segment(0, without, gradient, False)])
    assert torch.equal(with_squares, without)


@pytest.mark.parametrize(
    ("destination", "gradient"),
    [
        (torch.zeros(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16)),
        (torch.zeros(6), torch.ones(6, dtype=torch.float64)),
        (torch.zeros(12)[::2], torch.ones(6)),
        (torch.zeros(6), torch.ones(12, dtype=torch.float16)[::2]),
    ],
    ids=["a narrower master", "a float64 gradient", "a strided master", "a strided gradient"],
)
def test_what_the_loop_does_not_take_is_added_by_torch(adder, destination, gradient):
    segments = [Segment(0, torch.zeros(2), torch.ones(2), True), Segment(1, destination, gradient, False)]
    squares = torch.zeros(2, dtype=torch.float64)
    adder.add(segments, squares)
    assert destination.tolist() == [1] * 6
    assert squares.tolist() == pytest.approx([2, 6], rel=1e-12)


@pytest.mark.parametrize("elements", [1, 3, 5])
def test_unequal_lengths_are_an_error_that_leaves_everything_untouched(adder, elements):
    good, bad = torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match=rf"of shape \(4,\) cannot take a gradient of shape \({elements},\)"):
        adder.add([Segment(0, good, torch.ones(4), True), Segment(1, bad, torch.ones(elements), True)])
    assert good.tolist() + bad.tolist() == [0] * 8


@pytest.mark.parametrize(
    "squares",
    [torch.zeros(1), torch.zeros(2, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)],
    ids=["float32", "too long", "too short"],
)
def test_a_place_for_squares_that_does_not_fit_is_an_error_that_leaves_everything_untouched(adder, squares):
    destination = torch.zeros(4)
    with pytest.raises(ValueError, match=r"squares must be contiguous float64 of shape \(1,\)"):
        adder.add([Segment(0, destination, torch.ones(4), True)], squares)
    assert destination.tolist() == [0] * 4
