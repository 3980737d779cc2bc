"""The CPUOffloadOptimizer of torchao 0.5.0 to 0.10.0, in torchao.prototype.low_bit_optim. Stops at TF-0602.

The error and the guard are those of TF-0601 (`offloaded_gradients`); 0.10.0 moved the class to torchao.optim, and has
a copy left here.

Delete this file when no supported torchao is older than 0.11.0.
"""

from __future__ import annotations

from trainfix.fixes.torchao.offloaded_gradients import guard

FIX = guard(
    "torchao.prototype_offloaded_gradients", "TF-0602", "torchao.prototype.low_bit_optim.cpu_offload", ">=0.5.0,<0.11"
)
