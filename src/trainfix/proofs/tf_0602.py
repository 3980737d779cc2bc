"""Proof of TF-0602: the experiment of TF-0601, on the class where it was before."""

from __future__ import annotations

from . import tf_0601


def main() -> None:
    tf_0601.main("torchao.prototype.low_bit_optim.cpu_offload")
