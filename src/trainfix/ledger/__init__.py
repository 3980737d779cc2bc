"""The run-time monitor: what each backward contributed, against what the optimizer is about to consume.

Knows nothing of advisories. Torch is imported when a ledger begins, not with this package, which can be called:
``with trainfix.ledger(model, optimizer): ...``, see `trainfix.ledger.session`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **named: Any) -> Any:
        from trainfix.ledger.session import ledger

        return ledger(*args, **named)


sys.modules[__name__].__class__ = _Callable
