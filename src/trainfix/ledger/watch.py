"""The ledger of a whole process: finds models and optimizers by itself, and audits windows by a schedule.

Models are found when their forward pass begins, optimizers when they step, through torch's own global hooks. Between
audited windows one of these is left, which counts steps.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from trainfix import settings
from trainfix.engine.errors import UnbalancedError
from trainfix.ledger import exchange, trainer_log
from trainfix.ledger.audit import Finding
from trainfix.ledger.book import Book
from trainfix.ledger.consumers import stepped
from trainfix.ledger.schedule import Schedule
from trainfix.ledger.sink import Sink
from trainfix.ledger.tensors import alive
from trainfix.ledger.verdict import UNBALANCED, Verdict, judge

_PATIENCE = 8  # calls of an optimizer's step; DeepSpeed makes some before anything is trained

_started: Watch | None = None
_numbers = itertools.count()  # of this process's watches, in the same order on every rank


def start(wanted: settings.Ledger) -> None:
    """Audit this process from now on, once. An error of ours is said, and does not break the import that led here."""
    global _started
    if _started is None:
        sink = Sink(wanted.out)
        _started = Watch(wanted, sink)
        try:
            _started.begin()
        except Exception as error:
            sink.note(f"does not begin: {type(error).__name__}: {error} (training goes on without it)")


class Watch:
    """Audits the windows that `wanted` names, in this process; those of one optimizer where it is given."""

    def __init__(self, wanted: settings.Ledger, sink: Sink, only: torch.optim.Optimizer | None = None) -> None:
        self._schedule = Schedule(wanted.first, wanted.every)
        self._stops, self._sink, self._only = wanted.action == "stop", sink, only
        self._name = str(next(_numbers))
        self._book: Book | None = None
        self._over = False
        self._counter: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._closing: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # which make their gradient in `step`
        self._finding: RemovableHandle | None = None
        self._returning: list[RemovableHandle] = []
        self._roots: list[weakref.ref[torch.nn.Module]] = []
        self._known: dict[int, weakref.ref[torch.nn.Module]] = {}  # by id: every call of every module asks
        self._searched: dict[int, int] = {}
        self._primary: weakref.ref[torch.optim.Optimizer] | None = None
        self._follows = False  # transformers' Trainer, and what it logs
        self._rest = 0  # calls of the primary optimizer's step that are only counted
        self._last = 0  # of the windows in a row that are audited
        self._next = 1  # the first of them
        self.verdicts: list[Verdict] = []

    def begin(self, root: torch.nn.Module | None = None) -> None:
        """root: a model that need not be found."""
        self._counter = register_optimizer_step_pre_hook(self._safe(self._stepping))
        self._pause(0, 1)
        if root is not None and self._book is not None:
            self._know(root)
            self._find(self._book, root)

    def end(self) -> None:
        """Leave no hook behind. Not to be called within one."""
        self._over = True
        self._close()
        for handle in (self._counter, self._after):
            if handle is not None:
                handle.remove()

    def _safe(self, hook: Callable[..., object]) -> Callable[..., None]:
        """The hook; an error of its own ends the ledger and not the run."""

        def run(*args: Any) -> None:
            try:
                hook(*args)
            except UnbalancedError:
                raise
            except Exception as error:
                self._over = True
                self._sink.note(f"gave up: {type(error).__name__}: {error} (training goes on without it)")
                with suppress(Exception):
                    self._close()

        return run

    # --- windows

    def _open(self, window: int) -> None:
        """Listen to this window, and to those after it that are audited."""
        self._next, self._last = window, self._schedule.last_of(window)
        self._book = Book(self._judged, self._sink.note, name=self._name, number=window)
        # What is compiled is called under a hook of ours for a while; torch warns of hooks that fire twice.
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        self._finding = register_module_forward_pre_hook(self._safe(self._called))
        for root in [one() for one in self._roots]:
            if root is not None:
                self._add(self._book, root)

    def _close(self) -> None:
        if self._finding is not None:
            self._finding.remove()
            self._finding = None
        for handle in self._returning:
            handle.remove()
        self._returning.clear()
        if self._book is not None:
            self._book.close()
            self._book = None

    def _judged(self, found: Finding) -> None:
        earlier = (one.finding for one in reversed(self.verdicts) if one.finding.optimizer == found.optimizer)
        before = next(earlier, None)
        verdict = judge(found, before if before is not None and before.window == found.window - 1 else None)
        self.verdicts.append(verdict)
        self._sink.verdict(verdict)

    # --- torch's hooks

    def _called(self, module: torch.nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        known = self._known.get(id(module))
        if (known is not None and known() is module) or not torch.is_grad_enabled():
            return
        self._know(module)
        if self._book is not None and any(one.requires_grad for one in module.parameters()):
            self._find(self._book, module)

    def _know(self, root: torch.nn.Module) -> None:
        self._known.update({id(one): weakref.ref(one) for one in root.modules()})

    def _find(self, book: Book, root: torch.nn.Module) -> None:
        self._roots.append(weakref.ref(root))
        self._add(book, root)

    def _add(self, book: Book, root: torch.nn.Module) -> None:
        book.add(root)
        if book.is_waiting:

            def returned(*_: object) -> None:
                book.returned()
                if not book.is_waiting:
                    handle.remove()

            handle = root.register_forward_hook(self._safe(returned))
            self._returning.append(handle)

    def _stepping(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._over:
            return
        if self._rest:
            if self._primary is None:
                self._primary = weakref.ref(optimizer)
            if self._primary() is optimizer:
                self._rest -= 1
                if not self._rest:
                    self._open(self._next)
            return
        if self._book is None or (self._only is not None and optimizer is not self._only):
            return
        if self._book.has_failed:
            self._over = True
            self._close()
        elif _closure(args, named):
            self._wait_for_closure(optimizer)
        else:
            self._step(self._book, optimizer)

    def _wait_for_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient is made within this step: it is looked at when the step is through."""
        if isinstance(optimizer, torch.optim.LBFGS):
            self._sink.note("LBFGS takes several gradients in a step: its windows are not audited")
        else:
            self._closing.add(optimizer)
            if self._after is None:
                self._after = register_optimizer_step_post_hook(self._safe(self._stepped))

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer in self._closing:
            self._closing.discard(optimizer)
            if self._book is not None:
                self._step(self._book, optimizer)

    def _step(self, book: Book, optimizer: torch.optim.Optimizer) -> None:
        before = len(self.verdicts)
        if not self._follows:
            self._follows = True
            trainer_log.follow(self.verdicts, self._sink.remark)
        if book.audit(optimizer) is None:
            self._search(book, optimizer)
        if not book.step(optimizer):
            return
        if self._primary is None or self._primary() is None:
            self._primary = weakref.ref(optimizer)
        audit = book.audit(optimizer)
        assert audit is not None
        wrong = [one for one in self.verdicts[before:] if one.state == UNBALANCED]
        if self._stops:
            self._stop_if_wrong(audit.ranks, audit.key(), wrong)
        first = self._primary()
        primary = None if first is None else book.audit(first)
        if primary is None:
            return
        done = all(one.windows >= self._last for one in book.audits.values())
        if done or primary.windows > self._last:
            self._pause(primary.windows, primary.calls)

    def _pause(self, window: int, calls: int) -> None:
        """Nothing is listened to until the next audited window; calls: of the optimizer's step for one window."""
        self._close()
        following = self._schedule.next_after(window)
        if following is None:
            self._over = True
            return
        self._next = following
        self._rest = (following - 1 - window) * calls
        if not self._rest:
            self._open(following)

    def _stop_if_wrong(self, ranks: Any, name: str, wrong: list[Verdict]) -> None:
        line = exchange.share(ranks, name, wrong[0].line() if wrong else "")
        if line:
            self._over = True
            self._close()
            raise UnbalancedError(
                f"{line}. The optimizer has not taken this step. TRAINFIX_LEDGER asks to stop here; "
                "action=warn goes on, and `trainfix doctor` knows the errors that are catalogued"
            )

    def _search(self, book: Book, optimizer: torch.optim.Optimizer) -> None:
        """Find the model of an optimizer whose forward pass is compiled and was not seen, once, at its second call."""
        calls = self._searched[id(optimizer)] = self._searched.get(id(optimizer), 0) + 1
        root = _holder(optimizer) if calls == 2 else None
        if root is not None:
            self._know(root)
            self._find(book, root)
        elif calls == (2 if self._only is not None else _PATIENCE):
            self._sink.note(f"{type(optimizer).__name__} steps parameters of no model that was seen: it is not audited")


def _holder(optimizer: torch.optim.Optimizer) -> torch.nn.Module | None:
    """The largest module that has parameters of this optimizer."""
    own = stepped(optimizer)
    found = [one for one in alive(torch.nn.Module) if any(id(parameter) in own for parameter in one.parameters())]
    return max(found, key=lambda one: sum(1 for _ in one.modules()), default=None)


def _closure(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    closure = named.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer itself
    return closure is not None
