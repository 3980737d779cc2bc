"""The account of a process: its models, every backward that they see, and the optimizers that close the windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from trainfix.ledger import language_model
from trainfix.ledger.audit import Audit, Finding
from trainfix.ledger.capture import Capture
from trainfix.ledger.consumers import Consumer, Home, Unreadable, kinds
from trainfix.ledger.sample import draw
from trainfix.ledger.tokens import Tokens


class _Model(NamedTuple):
    root: torch.nn.Module
    consumer: Consumer
    prefix: str
    tokens: Tokens | None


class Book:
    """Listens to models until it is closed, for some windows in a row. Every finding goes to `judged`, on the first
    rank only; what cannot be read to `told`, as a text. name: that of the other ranks' books, and of no other of this
    process. number: of the first window."""

    def __init__(
        self,
        judged: Callable[[Finding], object],
        told: Callable[[str], object],
        *,
        name: str = "",
        number: int = 1,
    ) -> None:
        self._judged, self._told, self._name, self._number = judged, told, name, number
        self.has_failed = False
        self._capture = Capture(self._failed)
        self._capture.attach()
        self._models: list[_Model] = []
        self._sample: dict[str, torch.Tensor] = {}
        self._waiting: set[int] = set()  # models whose gradients' places show with the first forward pass
        self._steps: list[tuple[int, int]] = []  # (backwards seen before it, the audit's id)
        self.audits: dict[int, Audit] = {}  # by the ids of what the loop steps

    def add(self, root: torch.nn.Module) -> None:
        """Account for this outermost module too. One that holds a known one takes its place."""
        for part in kinds.roots(root):
            self._add(part)

    def _add(self, root: torch.nn.Module) -> None:
        inside = {id(one) for one in root.modules()}
        if any(id(one.root) in inside for one in self._models):
            kept = [one.root for one in self._models if id(one.root) not in inside]
            self.close()
            self._capture.attach()
            for one in kept:
                self._add(one)
        try:
            consumer = kinds.of(root)
        except Unreadable as error:
            self._told(f"{type(root).__name__} cannot be read: {error}")
            return
        clash = any(name in self._sample for name in consumer.sizes)
        prefix = f"{type(root).__name__} {len(self._models) + 1}: " if clash else ""
        language = None if _is_compiled(root) else language_model.find(root)
        model = _Model(
            root, consumer, prefix, None if language is None else Tokens(language, self._capture, self._failed)
        )
        self._models.append(model)
        self._sample.update({prefix + name: places for name, places in draw(consumer.sizes).items()})
        self._watch(model)

    def close(self) -> None:
        """Leave no hook behind, and let go of models and optimizers."""
        self._capture.clear()
        for model in self._models:
            if model.tokens is not None:
                model.tokens.detach()
        self._models.clear()
        self._sample.clear()
        self._waiting.clear()
        self.audits.clear()

    @property
    def is_waiting(self) -> bool:
        """Whether `returned` must be called when a forward pass is through."""
        return bool(self._waiting)

    def returned(self) -> None:
        """What had no place before has one now."""
        for model in self._models:
            if id(model.root) in self._waiting:
                self._watch(model)

    def audit(self, optimizer: torch.optim.Optimizer) -> Audit | None:
        """The audit of this optimizer's windows; None where it steps nothing that is accounted for."""
        for model in self._models:
            if found := self.audits.get(id(model.consumer.owner(optimizer))):
                return found
        return self._begin(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """This optimizer is about to consume its gradients. Whether that ends a window of it."""
        audit = self.audit(optimizer)
        if audit is None or not audit.is_whole(optimizer):
            return False
        rows = self._capture.since(audit.position)
        if rows:
            tokens = [model.tokens for model in self._models if model.tokens is not None]
            found = audit.judge(
                rows,
                [table for one in tokens for table in one.since(audit.position)],
                [count for count, other in self._steps if other != id(audit) and count > audit.position],
                full=self._capture.full,
                unseen=sum(one.unseen for one in tokens),
            )
            if found is not None:
                self._judged(found)
        # One that steps for the first time after this will ask for the same backwards.
        oldest = min(one.position for one in self.audits.values())
        audit.position = self._capture.count
        self._steps = [one for one in self._steps if one[0] >= oldest] + [(audit.position, id(audit))]
        self._capture.forget(oldest)
        for model in self._models:
            if model.tokens is not None:
                model.tokens.forget(oldest)
        return bool(rows)

    def _failed(self, error: Exception) -> None:
        self.has_failed = True
        self._told(f"gave up: {type(error).__name__}: {error} (training goes on without it)")

    def _begin(self, optimizer: torch.optim.Optimizer) -> Audit | None:
        homes: dict[str, Home] = {}
        groups: list[object] = []
        owner: object = optimizer
        for model in self._models:
            try:
                own = model.consumer.homes(optimizer)
            except (AttributeError, ValueError, IndexError, StopIteration) as error:
                self._told(f"{type(optimizer).__name__} cannot be read: {error}")
                own = {}
            if own:
                homes.update({model.prefix + name: home for name, home in own.items()})
                groups.append(model.consumer.group)
                owner = model.consumer.owner(optimizer)
        if not homes:
            return None
        name = type(owner).__name__ + (f" {len(self.audits) + 1}" if self.audits else "")
        audit = Audit(name, homes, self._sample, groups[0], book=self._name, number=self._number)
        self.audits[id(owner)] = audit
        return audit

    def _watch(self, model: _Model) -> None:
        leaves = model.consumer.leaves()
        self._capture.watch({model.prefix + name: leaf for name, leaf in leaves.items()}, self._sample)
        if len(leaves) < len(model.consumer.sizes):
            self._waiting.add(id(model.root))
        else:
            self._waiting.discard(id(model.root))
        if model.tokens is not None:
            model.tokens.attach()


def _is_compiled(root: torch.nn.Module) -> bool:
    """Hooks inside what torch.compile made one piece would break it into several."""
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in root.modules())
