"""LLaMA-Factory: every trained token of a window counts the same, also with a processor and with ASFT. Repairs TF-0201
and TF-0202.

- TF-0201: a checkpoint with a processor (every multimodal one). 7203365b8 (0.9.3) sets `model_accepts_loss_kwargs` to
  False once Trainer is built, against models that take the window's count and do not use it: each micro-batch's loss is
  a mean then, and the means are averaged over the window and over the ranks.
- TF-0202: use_asft_loss (0.9.5). `compute_loss` calls `compute_loss_func` without the count: a mean again, and Trainer,
  which expects of such a function that it has divided by the count, leaves out the division by the steps.

What we do instead: the window's tokens are counted, on all ranks, as soon as Trainer has read its micro-batches, and
each one's mean is multiplied by its share of them. That needs no model to take a count; whose mean it is, is told from
the model's `forward`. LLaMA-Factory's flag stays, so Trainer goes on dividing by the steps as it does. The methods that
do it are the trainer's own and stand from the beginning of a window to its end, whatever becomes of the class; those of
the class, which every training comes through, put the first one there.

Delete this file when no supported LLaMA-Factory has either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from trainfix.engine.contract import Fix, Function, Guard, Target
from trainfix.fixes import token_weighting
from trainfix.fixes.llamafactory.forward_loss import takes_mean
from trainfix.fixes.transformers import recognise

_SFT = "llamafactory.train.sft.trainer:CustomSeq2SeqTrainer."
_PT = "llamafactory.train.pt.trainer:CustomTrainer."
_TRAINER = "transformers.trainer:Trainer."

# LLaMA-Factory's own methods that a training comes through -> their shapes. The first is not called where DeepSpeed's
# configuration names the optimizer, nor the second where the data are streamed; the last comes after the first window
# was read, so it is there for the next one.
_BEGINNINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    _SFT: {
        "create_optimizer": ("e34729219d91", "168d80d9a794"),  # 0.9.0, 0.9.5
        "_get_train_sampler": ("d2d3ee40785c",),  # 0.9.3
        "compute_loss": ("71360e0e723d", "c608e53a0cff"),  # 0.9.3, 0.9.5
    },
    _PT: {
        "create_optimizer": ("e34729219d91", "168d80d9a794"),
        "_get_train_sampler": ("d2d3ee40785c",),
        "compute_loss": ("71360e0e723d",),
    },
}
_STANDS = "_trainfix_stands"  # marks our replacements: gone from the class, a trainer's next window is not ours


@dataclass
class _Window:
    """The window that a trainer is in. total: its tokens over all ranks. left: micro-batches still to come."""

    total: Any
    left: int


_windows: WeakKeyDictionary[Any, _Window] = WeakKeyDictionary()


def build(originals: Mapping[str, Function], advisories: frozenset[str]) -> Mapping[str, Function]:
    """The replacements. Called once LLaMA-Factory's trainers are imported."""

    def beginning(original: Function) -> Function:
        @wraps(original)
        def method(self: Any, *args: Any, **named: Any) -> Any:
            vars(self).setdefault("get_batch_samples", MethodType(_read_window, self))
            return original(self, *args, **named)

        setattr(method, _STANDS, True)
        return method

    paths = [path + name for path, names in _BEGINNINGS.items() for name in names]
    return {path: beginning(originals[path]) for path in paths}


def _read_window(self: Any, *args: Any, **named: Any) -> Any:
    """`get_batch_samples` of one trainer: what its class does, and the window's tokens."""
    vars(self).pop("compute_loss", None)  # of a window that did not come to its end
    if not any(hasattr(vars(cls).get("compute_loss"), _STANDS) for cls in type(self).__mro__):
        del self.get_batch_samples
    elif _repairs(self) and _own(self) is None:
        self.compute_loss = MethodType(_compute_loss, self)  # already now: whoever asks is told that the loss is taken
    batches, count = type(self).get_batch_samples(self, *args, **named)
    if "compute_loss" in vars(self):
        tokens = sum((_trained(batch) for batch in batches), _trained({}))
        _windows[self] = _Window(token_weighting.over_ranks(tokens, device=self.args.device), len(batches))
    return batches, count


def _compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
    """`compute_loss` of one trainer: the micro-batch's part of the mean over the window's tokens."""
    compute = type(self).compute_loss
    if not model.training or self not in _windows:
        return compute(self, model, inputs, *args, **named)
    window, tokens = _windows[self], _trained(inputs)
    window.left -= 1
    if window.left <= 0:
        vars(self).pop("compute_loss", None)
    if _is_asft(self) and not tokens:  # its own loss asks the device the same; 0 / 0 has no gradient that is 0
        return 0.0 * model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.float().mean()
    computed = compute(self, model, inputs, *args, **named)
    loss, *rest = computed if isinstance(computed, tuple) else (computed,)
    weighed = _weighed(loss, tokens, window.total, _divisor(self) * recognise.ranks(self))
    return (weighed, *rest) if rest else weighed


def _weighed(mean: Any, tokens: Any, total: Any, factor: int) -> Any:
    import torch

    share = tokens * factor / total.clamp(min=1).to(tokens.device)
    return torch.where(tokens.to(mean.device) > 0, mean * share.to(mean.device), torch.zeros_like(mean))


def _divisor(trainer: Any) -> int:
    """What `training_step` divides a loss by. Since 4.55.0 it knows how many micro-batches the window really has."""
    if trainer.compute_loss_func is not None:
        return 1
    return int(getattr(trainer, "current_gradient_accumulation_steps", recognise.steps(trainer)))


def _trained(batch: Mapping[str, Any]) -> Any:
    """The trained tokens of a micro-batch, a 0-dim tensor where its labels are: nobody waits for the device."""
    import torch

    labels = batch.get("labels")
    if labels is None:
        return torch.zeros((), dtype=torch.int64)
    return token_weighting.trained(labels)


def _is_asft(trainer: Any) -> bool:
    return bool(getattr(trainer.finetuning_args, "use_asft_loss", False))


def _several(trainer: Any) -> str:
    """In words, what the means are taken over; "" if there is only one."""
    steps, ranks = recognise.steps(trainer), recognise.ranks(trainer)
    return f"gradient_accumulation_steps = {steps}, {ranks} ranks" if steps > 1 or ranks > 1 else ""


def _flag_is_off(trainer: Any) -> str | None:
    if trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None or not _several(trainer):
        return None
    kind = type(recognise.plain_model(trainer)).__qualname__
    return f"a checkpoint with a processor ({kind}, model_accepts_loss_kwargs is off), {_several(trainer)}"


def _asft(trainer: Any) -> str | None:
    return f"use_asft_loss, {_several(trainer)}" if _is_asft(trainer) and _several(trainer) else None


def _repairs(trainer: Any) -> bool:
    if recognise.uncovered(trainer) is not None:
        return False
    return bool(_asft(trainer) or (_flag_is_off(trainer) and takes_mean(recognise.plain_model(trainer))))


def _own(trainer: Any) -> str | None:
    """What of the user's own stands in place of LLaMA-Factory's loss, where that is one of those we repair."""
    if not (_asft(trainer) or _flag_is_off(trainer)):
        return None
    for function in _losses(trainer):
        if function is not None:
            return f"own loss: {function.__module__}.{function.__qualname__}"
    return "own loss: label_smoothing_factor" if trainer.label_smoother is not None else None


def _losses(trainer: Any) -> Iterator[Callable[..., Any] | None]:
    """Each `compute_loss` that comes before LLaMA-Factory's own."""
    mine = vars(trainer).get("compute_loss")
    yield None if getattr(mine, "__func__", None) is _compute_loss else mine
    for cls in type(trainer).__mro__:
        if f"{cls.__module__}:{cls.__qualname__}." in (_SFT, _PT):
            return
        yield vars(cls).get("compute_loss")


def _target(path: str, *shapes: str) -> Target:
    return Target(path, frozenset(shapes))


# The comments are the first releases that have each shape.
FIX = Fix(
    name="llamafactory.window_mean",
    package="llamafactory",
    advisories=("TF-0201", "TF-0202"),
    requires={"llamafactory": ">=0.9.3", "transformers": ">=4.48.1,<=5.6.0"},
    targets=tuple(
        _target(path + name, *shapes) for path, names in _BEGINNINGS.items() for name, shapes in names.items()
    ),
    relies_on=(
        _target(_SFT + "__init__", "dfe71e8197a2", "d1870092c117", "b9cbe185ade3"),  # 0.9.3, 0.9.4, 0.9.5
        _target(_PT + "__init__", "ee0a9dbaebcc", "b078c8c01e0b", "fd559db557ae"),  # 0.9.3, 0.9.4, 0.9.5
        _target("llamafactory.train.trainer_utils:asft_loss_func", "absent", "a9723c929da5"),  # 0.9.5
        _target("llamafactory.train.trainer_utils:_asft_cross_entropy", "absent", "ee67df3bd14c"),  # 0.9.5
        _target("llamafactory.train.trainer_utils:_dft_cross_entropy", "absent", "16420a027151", "39b137198d26"),
        _target("llamafactory.train.trainer_utils:_kl_divergence", "absent", "c1bad7366b14"),  # 0.9.5
        _target(
            _TRAINER + "training_step",
            "13d3847e9107",  # 4.48.1
            "48afef0a9fe3",  # 4.49.0
            "a218e0f51e42",  # 4.50.0
            "4f847ded368d",  # 4.52.1
            "2597f11e27df",  # 4.53.0
            "b704c2aa2474",  # 4.55.0
            "7021488c3393",  # 4.56.0
            "266fa88bfa26",  # 5.0.0
            "fd8feb27f8a5",  # 5.2.0
        ),
        _target(
            _TRAINER + "compute_loss",
            "b65365e4f75c",  # 4.46.2
            "80fd3bfe1297",  # 4.49.0
            "c3bd3b186680",  # 4.53.0
            "babd934e9607",  # 4.54.0
            "9e4bf9f6391b",  # 4.57.1
            "6fe6fc1f658e",  # 5.0.0
            "3284b83db636",  # 5.2.0
        ),
    ),
    guards=(
        Guard(_SFT + "__init__", {"TF-0201": _flag_is_off, "TF-0202": _asft}),
        Guard(_PT + "__init__", {"TF-0201": _flag_is_off}),
    ),
    build=build,
    repairs=_repairs,
    group=lambda trainer: None,
    own=_own,
    limits=(
        "The trainer of KTransformers (use_kt in 0.9.4), hyper_parallel and Megatron's are not repaired; with tensor, "
        "context or sequence parallelism, or a model whose forward does not show how it computes its loss, a run that "
        "reaches the error is stopped"
    ),
)
