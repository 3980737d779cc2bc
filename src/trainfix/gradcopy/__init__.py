"""Carrying gradients from the device into the optimizer's master gradient on the host.

A `Carrier` per optimizer takes a bucket per call. Behind it stands one of four tiers, all with the same float32 bits:
sums resident on the device, a ring of copies through the device, an addition in a thread of the host, and plain torch.
Knows nothing of advisories or of DeepSpeed. Imports torch.
"""

from __future__ import annotations

from trainfix.gradcopy.arithmetic import squares_on_host
from trainfix.gradcopy.carrier import Carrier
from trainfix.gradcopy.choice import Wish
from trainfix.gradcopy.segments import Segment

__all__ = ["Carrier", "Segment", "Wish", "squares_on_host"]
