"""One optimizer's windows: at each step, what was contributed is compared with what is about to be consumed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from trainfix.engine import agreement
from trainfix.ledger import exchange
from trainfix.ledger.capture import Row, finite, stacked
from trainfix.ledger.consumers import Home, Part, read, stepped
from trainfix.ledger.tokens import COLUMNS
from trainfix.measure.balance import Balance, balance

# What sums in the parameters' dtype may be off by, relative to the size of what is added up.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Finding:
    """What a window's audit says. backwards: (rank, number) of each contribution in `balance`.

    of_ranks: rank -> the balance of what is consumed there alone, where the whole is not balanced.
    outliers: name -> its own scale relative to the window's, the worst first. apart: the share of elements at which
    ranks that should hold the same gradient hold different ones. parameters: how many are stepped. missing: ranks that
    did not report. differing: ranks whose model has other parameters. given_up: the first backwards of the window, by
    rank, that another optimizer's step or a gradient that was not finite may have put an end to: they are left out of
    `backwards`. size: norm of the sum of the contributions, over the sample. silent: parameters that no micro-batch of
    any rank brought a gradient for. twins: groups of ranks that brought the same, to the bit. incomplete: why the
    window cannot be judged, "" where it can. unseen: forward passes whose tokens could not be looked at.
    tokens: float64 [number of tokens.COLUMNS + 2, positions of all ranks]: rank and backward's number come first.
    """

    optimizer: str
    window: int
    balance: Balance | None
    backwards: tuple[tuple[int, int], ...]
    of_ranks: Mapping[int, Balance]
    outliers: Mapping[str, float]
    apart: float
    ranks: int
    parameters: int
    missing: tuple[int, ...]
    differing: tuple[int, ...]
    given_up: Mapping[int, int]
    size: float
    silent: tuple[str, ...]
    twins: tuple[tuple[int, ...], ...]
    incomplete: str
    unseen: int
    tokens: torch.Tensor


class Seen(NamedTuple):
    """What one rank saw.

    rows: contributions [backwards, elements]. consumed, held: see consumers.Part. cuts: numbers of backwards before
    which the window may have begun anew. tokens: see Finding. digest: of the parameters' names and sizes. state: number
    of passes without tokens, whether backwards are missing, whether a gradient was not finite.
    """

    rows: torch.Tensor
    consumed: torch.Tensor
    held: torch.Tensor
    cuts: torch.Tensor
    tokens: torch.Tensor
    digest: torch.Tensor
    state: torch.Tensor


class Audit:
    """Judges one optimizer's windows, on the first rank."""

    def __init__(
        self,
        name: str,
        homes: Mapping[str, Home],
        sample: Mapping[str, torch.Tensor],
        group: object,
        *,
        book: str = "",
        number: int = 1,
    ) -> None:
        self.name, self._homes, self._book = name, homes, book
        self._sample = {one: sample[one] for one in homes}
        self.ranks = agreement.join(group)
        self._own = 0 if self.ranks is None else self.ranks.own
        self._parts: dict[str, Part] = {}
        self._calls: dict[int, int] = {}
        self._earlier: torch.Tensor | None = None
        # First what the optimizer's own dtype allows for, then what the gradients came in with.
        self._roundings = [_rounding({home.holder.dtype for home in homes.values()})] * 2
        self.windows = number - 1  # judged, or before
        self.calls = 1  # of the step of the optimizer that ends a window, in one
        self.position = 0  # the backward that this window begins with

    def key(self) -> str:
        """The name of the window that was judged last, the same on every rank."""
        return f"{self._book}/{self.name}/{self.windows}"

    def is_whole(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take what this call of the optimizer's step consumes. Whether the window is now known as a whole."""
        now = stepped(optimizer)
        homes = {name: home for name, home in self._homes.items() if id(home.holder) in now}
        self._parts.update(read(homes, self._sample))
        self._calls[id(optimizer)] = self._calls.get(id(optimizer), 0) + 1
        if len(self._parts) < len(self._homes):
            return False
        self.calls = self._calls[id(optimizer)]
        self._calls.clear()
        return True

    def judge(
        self,
        rows: Sequence[Row],
        tokens: Sequence[tuple[int, torch.Tensor]],
        cuts: Sequence[int],
        *,
        full: bool,
        unseen: int,
    ) -> Finding | None:
        """What the window that ends now shows; None on other ranks than the first, and for one without a backward.

        rows: every backward since `position`. tokens: (backward's number, table). cuts: numbers of backwards before
        which another optimizer stepped. full, unseen: see Capture and Tokens.
        """
        self.windows += 1
        parts, self._parts = self._parts, {}
        arrived = {one.dtype for row in rows for name, one in row.samples.items() if name in self._sample}
        self._roundings[1] = _rounding(arrived)
        mine = self._seen(rows, tokens, cuts, parts, full=full, unseen=unseen)
        if self.ranks is None:
            return self._judged({0: mine})
        found = exchange.gather(self.ranks, self.key(), mine._asdict())
        if found is None:
            return None
        return self._judged({rank: None if part is None else Seen(**part) for rank, part in found.items()})

    def _seen(
        self,
        rows: Sequence[Row],
        tokens: Sequence[tuple[int, torch.Tensor]],
        others: Sequence[int],
        parts: Mapping[str, Part],
        *,
        full: bool,
        unseen: int,
    ) -> Seen:
        touching = [number for number, row in enumerate(rows) if any(name in row.samples for name in self._sample)]
        # What torch.autograd.grad asked for is no micro-batch, where others are.
        touching = [number for number in touching if rows[number].is_accumulated] or touching
        cuts = [one - self.position for one in others]
        broken = [number + 1 for number, fine in enumerate(finite(rows)) if not fine]
        if broken:  # the window was skipped, but its other micro-batches may still have come
            cuts += range(broken[-1], len(rows))
        # Numbers among the backwards that reach these parameters.
        places = {number: place for place, number in enumerate(touching)}
        kept = [sum(number < cut for number in touching) for cut in cuts]
        tables = [torch.zeros(len(COLUMNS) + 2, 0, dtype=torch.float64)]
        for number, table in tokens:
            if (place := places.get(number - self.position)) is not None:
                head = torch.tensor([[self._own], [place]], dtype=torch.float64).expand(2, table.shape[1])
                tables.append(torch.cat([head, table.to("cpu")]))
        empty = torch.zeros(0, dtype=torch.float64)
        told = "".join(f"{name} {len(places)} " for name, places in self._sample.items())
        ordered = [parts[name] for name in self._sample]
        return Seen(
            stacked([rows[number] for number in touching], self._sample),
            torch.cat([empty, *(one.consumed for one in ordered)]),
            torch.cat([empty.bool(), *(one.held for one in ordered)]),
            torch.tensor(sorted(set(kept) - {0}), dtype=torch.int64),
            torch.cat(tables, 1),
            torch.tensor(list(hashlib.sha256(told.encode()).digest())),
            torch.tensor([unseen, full, bool(broken)]),
        )

    def _judged(self, together: Mapping[int, Seen | None]) -> Finding | None:
        own = next(seen for seen in together.values() if seen is not None)
        here = {rank: seen for rank, seen in together.items() if seen is not None}
        differing = tuple(rank for rank, seen in here.items() if not torch.equal(seen.digest, own.digest))
        here = {rank: seen for rank, seen in here.items() if rank not in differing}
        missing = tuple(rank for rank, seen in together.items() if seen is None)
        if not any(len(seen.rows) for seen in here.values()):
            return None
        reasons = [
            f"ranks {', '.join(map(str, differing))} hold other parameters (pipeline parallelism?)"
            if differing
            else "",
            f"ranks {', '.join(map(str, missing))} did not report" if missing else "",
            "the window has more backwards than are kept" if any(bool(seen.state[1]) for seen in here.values()) else "",
        ]
        consumed, owner, apart = _joined(here, max(self._roundings))
        # The whole window first; then, where it may have begun anew, what came after.
        possible = []
        for begins in _begins(here):
            attempt = self._balanced(here, consumed, owner, begins)
            if attempt is not None:
                possible.append((begins, *attempt))
                if attempt[0].verdict == "balanced":
                    break
        if not possible:
            return None
        begins, found, of_ranks = possible[-1] if possible[-1][1].verdict == "balanced" else possible[0]
        if found.verdict != "balanced" and any(bool(seen.state[2]) for seen in here.values()):
            reasons.append("a gradient was not finite: the optimizer may have skipped a window")
        incomplete = "; ".join(reason for reason in reasons if reason)
        self._earlier = torch.cat([seen.rows for seen in here.values()])
        names = list(self._sample)
        return Finding(
            optimizer=self.name,
            window=self.windows,
            balance=found,
            backwards=tuple((rank, k) for rank, seen in here.items() for k in range(begins[rank], len(seen.rows))),
            of_ranks=of_ranks,
            outliers={names[one.parameter]: one.scale for one in found.outliers},
            apart=apart,
            ranks=len(together),
            parameters=len(names),
            missing=missing,
            differing=differing,
            given_up={rank: begin for rank, begin in begins.items() if begin},
            size=float(torch.linalg.vector_norm(self._earlier.sum(0))),
            silent=tuple(name for name, used in zip(names, self._used(self._earlier), strict=True) if not used),
            twins=_twins(here),
            incomplete=incomplete,
            unseen=sum(int(seen.state[0]) for seen in here.values()),
            tokens=torch.cat([seen.tokens for seen in here.values()], 1),
        )

    def _used(self, rows: torch.Tensor) -> list[bool]:
        """Whether each parameter has a contribution in any of these rows [backwards, elements]."""
        sizes = [len(places) for places in self._sample.values()]
        return [bool(part.any()) for part in torch.split(rows, sizes, 1)]

    def _balanced(
        self, here: Mapping[int, Seen], consumed: torch.Tensor, owner: torch.Tensor, begins: Mapping[int, int]
    ) -> tuple[Balance, Mapping[int, Balance]] | None:
        rows = torch.cat([seen.rows[begins[rank] :] for rank, seen in here.items()])
        if not len(rows) or not bool(torch.isfinite(rows).all()) or not bool(torch.isfinite(consumed).all()):
            return None
        sizes = torch.tensor([len(places) for places in self._sample.values()])
        numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
        earlier = self._earlier
        if earlier is not None and not bool(torch.isfinite(earlier).all()):
            earlier = None

        def balanced(where: torch.Tensor) -> Balance:
            before = None if earlier is None else earlier[:, where]
            exact, coarse = (
                balance(rows[:, where], consumed[where], numbers[where], earlier=before, rounding=rounding)
                for rounding in self._roundings
            )
            if exact.verdict != "unbalanced" or coarse.verdict == "unbalanced":
                return exact
            return replace(coarse, rough=exact.outliers[0].error)

        found = balanced(torch.ones_like(owner, dtype=torch.bool))
        if bool(rows.any()) and not bool(consumed.any()):  # what nothing arrives of has no scale to differ from
            found = replace(found, verdict="unbalanced", coefficients=(0.0,) * len(rows))
        if found.verdict != "unbalanced" or len(here) < 2:
            return found, {}
        return found, {rank: balanced(owner == rank) for rank in here if bool((owner == rank).any())}


def _rounding(dtypes: Collection[torch.dtype]) -> float:
    return max((_ROUNDING.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)


def _twins(here: Mapping[int, Seen]) -> tuple[tuple[int, ...], ...]:
    """The ranks whose backwards are the same, group by group."""
    groups: dict[bytes, list[int]] = {}
    for rank, seen in here.items():
        if bool(seen.rows.any()):
            groups.setdefault(hashlib.sha256(seen.rows.numpy().tobytes()).digest(), []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values() if len(ranks) > 1)


def _begins(here: Mapping[int, Seen]) -> list[dict[int, int]]:
    """Rank -> the first backward of the window: the first one, then wherever it may have begun anew."""
    cuts = {0} | {cut for seen in here.values() for cut in seen.cuts.tolist()}
    return [{rank: min(cut, len(seen.rows)) for rank, seen in here.items()} for cut in sorted(cuts)]


def _joined(seen: Mapping[int, Seen], rounding: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The consumed gradient, each element from the first rank that holds it; that rank, -1 for none; and the share at
    which other ranks hold something else."""
    first = next(iter(seen.values()))
    joined, owner = first.consumed.clone(), torch.full(first.held.shape, -1)
    apart = torch.zeros_like(first.held)
    for rank, part in seen.items():
        known = owner >= 0
        off = (joined - part.consumed).abs() > rounding * joined.abs().mean()
        apart |= known & part.held & off
        new = ~known & part.held
        joined, owner = torch.where(new, part.consumed, joined), torch.where(new, rank, owner)
    return joined, owner, float(apart.double().mean()) if len(apart) else 0.0
