"""All ranks of a process group run the same repair, or every rank that has trainfix raises.

Never a silent mixture, never a hang.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import suppress
from typing import Any, NamedTuple

TIMEOUT_SECONDS = 60.0
_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.01, 0.5
_READ_SECONDS = 2.0
_NAMED = 8  # a message for a thousand ranks need not name them all
_agreed: set[tuple[str, int, tuple[int, ...]]] = set()


class Ranks(NamedTuple):
    """The ranks of a process group, which of them this is, and the store that they share."""

    store: Any
    ranks: tuple[int, ...]
    own: int


def disagreement(name: str, digest: str, group: Any, timeout: float | None = None) -> str | None:
    """Publish this rank's `digest` of the fix `name` in the group's store, wait for the others, and compare.

    Returns None if all agree or there is nothing to agree on (no group, one rank, no store), else which ranks are
    missing or different. Waits at most `timeout` seconds (default TIMEOUT_SECONDS). A group agrees once per fix,
    under the restart count.
    """
    joined = join(group)
    if joined is None:
        return None
    store, ranks, own = joined
    key = (name, id(store), ranks)
    if key in _agreed:
        return None
    prefix = f"trainfix/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}/{'.'.join(map(str, ranks))}"
    timeout = TIMEOUT_SECONDS if timeout is None else timeout
    try:
        found = _exchange(store, prefix, ranks, own, digest, timeout)
    except RuntimeError as error:  # torch's DistError: the rank that holds the store is gone
        return f"the ranks' store cannot be reached ({error}): the rank that holds it has ended"
    others = {rank: value for rank, value in found.items() if value != digest}
    complaints = [
        f"rank {rank} did not answer within {timeout:g} s "
        "(trainfix is missing, off or disabled there, or that rank has ended)"
        if value is None
        else f"rank {rank} runs {value}"
        for rank, value in list(others.items())[:_NAMED]
    ]
    if len(others) > _NAMED:
        complaints.append(f"and {len(others) - _NAMED} more ranks do not agree")
    if not complaints:
        _agreed.add(key)
        return None
    return f"rank {own} runs {digest}, but " + "; ".join(complaints)


def join(group: Any) -> Ranks | None:
    """The ranks of `group` (None is all) and their store; None where this rank is alone: no group, or no store."""
    dist: Any = sys.modules.get("torch.distributed")  # nobody has a group before it is imported
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    ranks = tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))
    own = dist.get_rank()
    if len(ranks) < 2 or own not in ranks:
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError, RuntimeError):
        return None
    return None if store is None else Ranks(store, ranks, own)  # MPI has none


def _exchange(
    store: Any, prefix: str, ranks: tuple[int, ...], own: int, digest: str, timeout: float
) -> dict[int, str | None]:
    """What each rank published; None for one that had not when the time was up.

    While all agree this costs a rank a few requests, however many ranks there are: the last one to come counts who came
    with its digest and leaves the verdict. Only where they differ is every rank's digest read.
    """
    tag = hashlib.sha256(digest.encode()).hexdigest()[:16]
    alike, verdict = f"{prefix}/alike/{tag}", f"{prefix}/verdict"
    store.set(f"{prefix}/{own}", digest)
    store.add(alike, 1)
    if store.add(f"{prefix}/present", 1) >= len(ranks):
        store.set(verdict, tag if store.add(alike, 0) >= len(ranks) else "differ")
    if wait(store, [verdict], timeout) and store.get(verdict).decode() == tag:
        return dict.fromkeys(ranks, digest)
    present = [rank for rank in ranks if store.check([f"{prefix}/{rank}"])]
    found = {rank: store.get(f"{prefix}/{rank}").decode() if rank in present else None for rank in ranks}
    # This rank is about to end, and the store with it if it holds it: the others read first.
    with suppress(RuntimeError):
        store.set(f"{prefix}/{own}/read", "")
        wait(store, [f"{prefix}/{rank}/read" for rank in present], min(timeout, _READ_SECONDS))
    return found


def wait(store: Any, keys: list[str], timeout: float) -> bool:
    """Whether all keys were there within `timeout` seconds. Asks less and less often, for the sake of large groups."""
    deadline, pause = time.monotonic() + timeout, _POLL_SECONDS
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_SECONDS)
    return True
