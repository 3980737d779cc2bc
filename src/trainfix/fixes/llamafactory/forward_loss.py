"""Is the loss that a model returns the mean over a micro-batch's trained tokens? Told from the source of its `forward`.

Multimodal models are of many classes, and many compute the loss in a `forward` of their own. What they call for it is
one of a few functions, which all take the mean if nobody hands them a count.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

# Functions that may stand for a model's `loss_function`.
_LOSS_FUNCTIONS = frozenset({"transformers.loss.loss_utils.ForCausalLMLoss"})

# Called in a `forward`, without a reduction of their own, these take the mean over the tokens that are not ignored.
# Liger's were read (0.6.4), not run: they need a GPU.
_MEANS = frozenset({"CrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss", "LigerForCausalLMLoss", "cross_entropy"})


def takes_mean(model: Any) -> bool:
    """Whether all that this model's `forward` may compute a loss with takes the mean. No PEFT or DDP is around it."""
    found = [_is_mean(model, call) for call in _calls(type(model).forward)]
    told = [one for one in found if one is not None]
    return bool(told) and all(told)


def _is_mean(model: Any, call: ast.Call) -> bool | None:
    """None if this call computes no loss."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "loss_function":
        function = getattr(model, "loss_function", None)
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}" in _LOSS_FUNCTIONS
    if name in _MEANS:
        return not any(one.arg in ("reduction", "weight", "label_smoothing") for one in call.keywords)
    if _hands_on_labels(call):
        child = getattr(model, name, None)
        return hasattr(child, "forward") and takes_mean(child)
    return None


def _hands_on_labels(call: ast.Call) -> bool:
    """``self.part(..., labels=labels)``: the part computes the loss."""
    of_self = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    given = any(one.arg == "labels" and isinstance(one.value, ast.Name) for one in call.keywords)
    return of_self and given and call.func.value.id == "self"  # type: ignore[attr-defined]


def _calls(forward: Any) -> Iterator[ast.Call]:
    return (node for node in ast.walk(_tree(inspect.unwrap(forward))) if isinstance(node, ast.Call))


@lru_cache
def _tree(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # built without a file
        return ast.Module([], [])
