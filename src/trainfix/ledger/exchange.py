"""What every rank saw in a window comes together on the first one, through the process group's store.

No collective: a rank that does not come is named after a while, and nobody hangs.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping

import torch

from trainfix.engine import agreement
from trainfix.engine.agreement import Ranks

TIMEOUT_SECONDS = 60.0


def gather(
    ranks: Ranks, name: str, mine: Mapping[str, torch.Tensor], timeout: float | None = None
) -> dict[int, dict[str, torch.Tensor] | None] | None:
    """Hand in `mine` under `name`, which every rank uses once. On the first rank: each rank's, None for one that has
    not come within `timeout` seconds (default TIMEOUT_SECONDS). On the others None, at once: they do not wait.
    """
    prefix = _key(ranks, name)
    if ranks.own != ranks.ranks[0]:
        packed = io.BytesIO()
        torch.save(dict(mine), packed)
        ranks.store.set(f"{prefix}/{ranks.own}", packed.getvalue())
        return None
    found: dict[int, dict[str, torch.Tensor] | None] = {ranks.own: dict(mine)}
    end = time.monotonic() + (TIMEOUT_SECONDS if timeout is None else timeout)
    for rank in ranks.ranks[1:]:
        key = f"{prefix}/{rank}"
        found[rank] = None
        if agreement.wait(ranks.store, [key], end - time.monotonic()):
            found[rank] = torch.load(io.BytesIO(ranks.store.get(key)), weights_only=True)
            ranks.store.delete_key(key)
    return found


def share(ranks: Ranks | None, name: str, text: str, timeout: float | None = None) -> str:
    """What the first rank says under `name`, on every rank; "" on one that waits for it longer than `timeout`."""
    if ranks is None:
        return text
    key = _key(ranks, f"said/{name}")
    if ranks.own == ranks.ranks[0]:
        ranks.store.set(key, text or " ")
        return text
    there = agreement.wait(ranks.store, [key], TIMEOUT_SECONDS if timeout is None else timeout)
    return ranks.store.get(key).decode().strip() if there else ""


def _key(ranks: Ranks, name: str) -> str:
    """Of this group, and of this start of its ranks."""
    return f"trainfix/ledger/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{ranks.ranks[0]}/{name}"
