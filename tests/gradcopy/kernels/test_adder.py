"""Which kernel is taken, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.gradcopy.kernels.buckets import CPU
from tests.gradcopy.kernels.test_launches import RowByRow
from trainfix.gradcopy import kernels
from trainfix.gradcopy.kernels import Unavailable, adder


class AddsTwice(RowByRow):
    def _launch(self, *arguments, **how):
        super()._launch(*arguments, **how)
        super()._launch(*arguments, **{**how, "first": False})


class LeavesSquaresOut(RowByRow):
    def _launch(self, gradient, destination, rows, squares, **how):
        super()._launch(gradient, destination, rows, None, **how)


def cannot_be_had(device):
    raise OSError("no compiler")


def taken(monkeypatch, **made):
    monkeypatch.setattr(kernels, "_KERNELS", made)
    return kernels._first_that_works(CPU)


def right(device):
    return RowByRow()


def test_the_first_kernel_that_adds_right_is_taken(monkeypatch):
    assert type(taken(monkeypatch, one=right, two=cannot_be_had)) is RowByRow


def test_a_kernel_that_cannot_be_had_is_passed_over(monkeypatch):
    assert type(taken(monkeypatch, one=cannot_be_had, two=right)) is RowByRow


@pytest.mark.parametrize("wrong", [AddsTwice, LeavesSquaresOut])
def test_a_kernel_that_adds_wrong_on_this_machine_is_passed_over(monkeypatch, wrong):
    assert type(taken(monkeypatch, one=lambda device: wrong(), two=right)) is RowByRow
    with pytest.raises(Unavailable, match=r"no kernel for cpu\. one: RuntimeError: it adds wrong on this device"):
        taken(monkeypatch, one=lambda device: wrong())


def test_where_there_is_no_kernel_the_reason_of_each_is_said(monkeypatch):
    with pytest.raises(Unavailable, match=r"Triton: OSError: no compiler\. CUDA: OSError: no compiler"):
        taken(monkeypatch, Triton=cannot_be_had, CUDA=cannot_be_had)


def test_a_torch_that_compiles_no_cuda_is_named(monkeypatch):
    monkeypatch.delattr(torch.cuda, "_compile_kernel")
    with pytest.raises(Unavailable, match=r"CUDA C\+\+: Unavailable: torch .* has no torch\.cuda\._compile_kernel"):
        kernels._first_that_works(CPU)


def test_a_device_that_is_no_gpu_has_no_kernel():
    with pytest.raises(Unavailable, match="there is no kernel for cpu, only for GPUs that torch calls cuda"):
        adder(CPU)


def test_importing_the_kernels_wants_neither_triton_nor_numpy():
    absent = "import sys; sys.modules['triton'] = sys.modules['numpy'] = None; "
    modules = ("launches", "table", "twin")
    code = absent + "; ".join(f"import trainfix.gradcopy.kernels.{module}" for module in modules)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
