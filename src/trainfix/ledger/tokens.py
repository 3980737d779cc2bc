"""With which weight each token entered the loss: seen at the hidden states in front of the output matrix, as gradients
come back to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from trainfix.ledger.capture import Capture
from trainfix.ledger.language_model import LanguageModel
from trainfix.ledger.sample import SEED
from trainfix.ledger.tensors import guarded, local
from trainfix.measure.next_token import Directions, Output, directions, fit, mean_of, misfit, towards

# How many positions of one forward pass are looked at: all up to MOST where the output matrix is small, else LEAST,
# which in a pass of a thousand positions is a few percent of what the matrix costs anyway.
LEAST, MOST = 16, 512
_WORK = 2**24  # multiplications that are not worth saving

# Beside those of padding, crossing, label and position these are fields of measure.evenness.Positions.
COLUMNS = (
    "passes",
    "sequence",
    "position",
    "weights",
    "residuals",
    "smoothed",  # the weight, with label smoothing as a second direction
    "shares",  # of label smoothing
    "left_over",
    "own",  # the residual for the position's own token as the target: labels that were not shifted
    "later",  # the residual for the token after the next: labels that were shifted twice
    "before",  # the residual for the token before: labels that were shifted the wrong way
    "padding",  # 1: the next token is padding
    "crossing",  # 1: the next token begins another document
    "label",  # 1: the next token is among the labels, 0: it is not, -1: no labels were given
    "losses",
    "trained",  # how many positions of this pass a gradient came back to
)


class Tokens:
    """Listens to one language model while it is attached. One table [columns, positions] for each forward pass whose
    gradient came back, kept on its device: nothing waits, nothing is changed."""

    def __init__(self, model: LanguageModel, capture: Capture, failed: Callable[[Exception], object]) -> None:
        self._model, self._capture, self._failed = model, capture, failed
        self._handles: list[RemovableHandle] = []
        self._pass = _Pass(0)
        self._is_inside = False  # of a call of the model
        self._tables: list[tuple[int, torch.Tensor]] = []
        self._generator = torch.Generator().manual_seed(SEED)  # not the user's
        self._mean: torch.Tensor | None = None  # of the output matrix's rows, while a window lasts
        self._passes = 0  # that were met so far
        self.unseen = 0  # passes whose output matrix was not at hand

    def attach(self) -> None:
        if self._handles:
            return
        model, safe = self._model, partial(guarded, failed=self._failed)
        self._handles = [
            model.embedding.register_forward_pre_hook(safe(self._embedding)),
            model.head.register_forward_pre_hook(safe(self._head)),
            model.module.register_forward_pre_hook(safe(self._called), with_kwargs=True),
            model.module.register_forward_hook(safe(self._returned), with_kwargs=True),
        ]
        if model.body is not None:
            self._handles += [
                model.body.register_forward_pre_hook(safe(self._inputs), with_kwargs=True),
                model.body.register_forward_hook(safe(self._body)),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tables.clear()
        self._pass = _Pass(0)
        self.unseen = 0

    def since(self, number: int) -> list[tuple[int, torch.Tensor]]:
        """(the backward's number, its table) from that backward on."""
        return [one for one in self._tables if one[0] >= number]

    def forget(self, number: int) -> None:
        self._tables = self.since(number)
        self._mean = None

    def _called(self, _: object, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._begin()
        self._is_inside = True
        self._keep(named)

    def _returned(self, _: object, args: tuple[Any, ...], named: Mapping[str, Any], output: object) -> None:
        self._keep(named)
        self._is_inside = False

    def _keep(self, named: Mapping[str, Any]) -> None:
        if not self._model.has_encoder:
            self._pass.keep(named)

    def _begin(self) -> None:
        self._passes += 1
        self._pass = _Pass(self._passes)

    def _inputs(self, _: object, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if not self._is_inside:  # the body alone is called, for a loss that makes its own logits
            self._begin()
        self._keep(named)

    def _embedding(self, _: object, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2:
            if not self._is_inside and self._model.body is None:
                self._begin()
            self._pass.ids = args[0].detach()

    def _body(self, _: object, args: object, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        self._meet(output[0] if hidden is None and isinstance(output, (tuple, list)) and output else hidden)

    def _head(self, _: object, args: tuple[Any, ...]) -> None:
        if args:
            self._meet(args[0])  # what the logits are really made of, where it is not given in chunks
        self._pass.direct(self._output)

    def _meet(self, hidden: Any) -> None:
        """The hidden states of a pass [sequences, positions, hidden]."""
        one = self._pass
        if not isinstance(hidden, torch.Tensor) or not hidden.requires_grad or not torch.is_grad_enabled():
            return
        if one.ids is None or hidden.shape[:-1] != one.ids.shape or id(hidden) == one.met:
            return
        one.met = id(hidden)
        one.choose(hidden, self._generator, self._most(hidden.shape[-1]))
        hidden.register_hook(guarded(partial(self._came_back, one, one.source), self._failed))  # type: ignore[no-untyped-call]

    def _output(self) -> Output | None:
        """How logits are made, where the whole matrix is at hand; the mean of its rows is found once in a window."""
        output = self._model.output()
        if output is None:
            return None
        if self._mean is None:
            self._mean = mean_of(output.matrix)
        return replace(output, mean=self._mean)

    def _most(self, size: int) -> int:
        return min(MOST, max(LEAST, _WORK // (self._model.embedding_shape()[0] * size)))

    def _came_back(self, one: _Pass, source: int, gradient: torch.Tensor) -> None:
        if source != one.source or one.sample is None:
            return
        one.direct(self._output)
        number = self._capture.current()
        if one.found is None:
            self.unseen += 1
            return
        self._tables.append((number, one.table(local(gradient.detach()), self._output())))


class _Sample(NamedTuple):
    """flat: the positions that are looked at, counted through all sequences, int64 on the hidden states' device."""

    flat: torch.Tensor
    hidden: torch.Tensor
    targets: torch.Tensor


class _Pass:
    """One forward pass of the language model."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ids: torch.Tensor | None = None
        self.given: dict[str, torch.Tensor] = {}
        self.met: int | None = None  # the id of the hidden states, which must not be kept alive
        self.source = 0
        self.sample: _Sample | None = None
        self.found: Directions | None = None

    def keep(self, named: Mapping[str, Any]) -> None:
        """Take what is known of the ids beside them."""
        for name in ("attention_mask", "position_ids", "labels"):
            value = named.get(name)
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                self.given.setdefault(name, value.detach())

    def choose(self, hidden: torch.Tensor, generator: torch.Generator, most: int) -> None:
        """Take a sample of the positions that have a next token, those with labels first."""
        assert self.ids is not None
        self.source, self.found = self.source + 1, None
        device = hidden.device
        rank = torch.rand(self.ids.shape, generator=generator)
        rank[:, -1] -= 4
        rank = rank.to(device, non_blocking=True)
        labels = self._labels()
        if labels is not None:
            rank = rank + labels.to(device)
        count = min(most, self.ids.shape[0] * (self.ids.shape[1] - 1))
        flat = torch.topk(rank.reshape(-1), count, sorted=False).indices
        targets = self.ids.roll(-1, 1).reshape(-1).to(device)[flat]
        self.sample = _Sample(flat, hidden.detach().reshape(-1, hidden.shape[-1])[flat], targets)

    def direct(self, output_now: Callable[[], Output | None]) -> None:
        """Find the directions of the sample's targets, once, while the whole output matrix is at hand."""
        output = output_now() if self.sample is not None and self.found is None else None
        if output is not None and self.sample is not None:
            with torch.no_grad(), torch.autocast(self.sample.hidden.device.type, enabled=False):
                self.found = directions(self.sample.hidden, output, self.sample.targets)

    def table(self, gradient: torch.Tensor, output: Output | None) -> torch.Tensor:
        assert self.sample is not None and self.found is not None and self.ids is not None
        flat, hidden, targets = self.sample
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            rows = gradient.reshape(-1, gradient.shape[-1])
            mine = rows[flat]
            plain = fit(mine, self.found)
            shifted = [self.ids.roll(shift, 1).reshape(-1).to(flat.device)[flat] for shift in (0, -2, 1)]
            if output is None:
                others = [torch.ones_like(plain.residuals) for _ in shifted]
            else:
                others = [misfit(mine, one) for one in towards(self.found, hidden, output, targets, shifted)]
            trained = (rows != 0).any(-1).sum().expand(len(flat))
            width = self.ids.shape[1]
            columns = [torch.full_like(flat, self.number), flat // width, flat % width, plain.weights, plain.residuals]
            columns += [plain.smoothed, plain.shares, plain.left_over, *others]
            columns += [one.reshape(-1).to(flat.device)[flat] for one in (self._padding(), self._crossing())]
            labels = self._labels()
            columns.append(
                torch.full_like(plain.weights, -1) if labels is None else labels.reshape(-1).to(flat.device)[flat]
            )
            columns += [self.found.losses, trained]
            return torch.stack([one.to(flat.device, torch.float64) for one in columns])

    def _labels(self) -> torch.Tensor | None:
        """1 where the next token is among the labels [sequences, positions]."""
        labels = self.given.get("labels")
        if labels is None or self.ids is None or labels.shape != self.ids.shape:
            return None
        return _next(labels != -100)

    def _padding(self) -> torch.Tensor:
        assert self.ids is not None
        mask = self.given.get("attention_mask")
        if mask is None or mask.shape != self.ids.shape:
            return torch.zeros_like(self.ids)
        return _next(mask == 0)

    def _crossing(self) -> torch.Tensor:
        """Where positions begin anew, another document begins; padding has no position of its own."""
        assert self.ids is not None
        places = self.given.get("position_ids")
        if places is None or places.shape[-1] != self.ids.shape[-1]:
            return torch.zeros_like(self.ids)
        begins = (_next(places) <= places).to(torch.int64).expand(self.ids.shape)
        padding = self._padding()
        return begins * (1 - padding) * (1 - padding.roll(1, 1))


def _next(values: torch.Tensor) -> torch.Tensor:
    """What the position after each one has; 0 for the last."""
    moved = values.to(torch.int64).roll(-1, 1)
    moved[:, -1] = 0
    return moved
