"""One of two ranks on which FSDP trains a tiny Llama under the ledger, one configuration after the other.

python -m tests.ledger.fsdp_runs RANK PORT CONFIGURATIONS

CONFIGURATIONS is a JSON object, name -> fields of `Configuration`. The first rank prints one JSON line for each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

RANKS = 2
LENGTHS = {0: (9, 24, 5), 1: (17, 6, 12)}  # positions of each rank's micro-batches
NAMED = "model.layers.1.mlp.up_proj.weight"  # the parameter that loses its gradient


@dataclass(frozen=True)
class Configuration:
    """kind: fsdp1, fsdp2, or hybrid: fsdp2 where the second rank has a copy. options: of the framework's call.
    sync: "every" micro-batch is averaged over ranks, or the "last". model: "", "tied", "frozen" (the embedding and a
    layer), "frozen layer", "branch" (which no forward pass uses before the second window).
    fault: "", "dropped", "not cleared", "lost", "never averaged", "mean of means". clip: "", "by all" ranks' norm, or
    "by each" rank's own. how: the ledger is "told" model and optimizer, has them "found", or is "off"."""

    kind: str
    options: dict[str, Any]
    sync: str = "last"
    model: str = ""
    fault: str = ""
    clip: str = ""
    how: str = "told"
    windows: int = 2


class Run:
    def __init__(self, wanted: Configuration, rank: int) -> None:
        self.wanted, self.rank = wanted, rank
        self.model = _sharded(_llama(wanted.model), wanted)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.kept: list[torch.Tensor | None] = []

    def result(self) -> dict[str, Any]:
        windows: list[dict[str, Any]] = []
        notes: list[str] = []
        with _listening(self, notes) as verdicts:
            for window in range(self.wanted.windows):
                self.window(window)
            windows += [_row(one) for one in verdicts]
        return {"windows": windows, "notes": notes, "hooks": _hooks(self.model), "parameters": _digest(self.model)}

    def window(self, window: int) -> None:
        fault, steps = self.wanted.fault, len(LENGTHS[0])
        total = sum(length - 1 for lengths in LENGTHS.values() for length in lengths)
        for number, length in enumerate(LENGTHS[self.rank]):
            ids = _words(length, 100 * window + 10 * number + self.rank)
            uses = {"branch": window > 0} if self.wanted.model == "branch" else {}
            self.synchronise(fault != "never averaged" and (self.wanted.sync == "every" or number == steps - 1))
            with self.alone:
                scores, extra = _scores(self.model(input_ids=ids, **uses))
                losses = torch.nn.functional.cross_entropy(
                    scores[:, :-1].reshape(-1, scores.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="sum"
                )
                loss = losses / (length - 1) / steps if fault == "mean of means" else losses * RANKS / total
                (loss + extra).backward()
            if fault == "dropped":
                self.drop(number)
        if fault == "lost":
            self.lose()
        if self.wanted.clip == "by all" and self.wanted.kind == "fsdp1":
            self.model.clip_grad_norm_(0.1)
        elif self.wanted.clip:  # of FSDP2's parameters, torch knows that they are spread over ranks
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        if fault != "not cleared":
            self.optimizer.zero_grad()

    def synchronise(self, wanted: bool) -> None:
        """Whether gradients are averaged over the ranks after the next backward."""
        self.alone: Any = contextlib.nullcontext()
        if self.wanted.kind == "fsdp1":
            self.alone = self.alone if wanted else self.model.no_sync()
        elif self.wanted.kind == "hybrid":
            self.model.set_requires_all_reduce(wanted)
        else:
            self.model.set_requires_gradient_sync(wanted)

    def drop(self, number: int) -> None:
        """The second micro-batch's gradients are taken out of what was added up."""
        now = _accumulated(self.model)
        if number == 0:
            self.kept = [None if one is None else one.clone() for one in now]
        if number == 1:
            with torch.no_grad():
                for one, before in zip(now, self.kept, strict=True):
                    if one is not None and before is not None:
                        one.copy_(before)

    def lose(self) -> None:
        for name, one in self.model.named_parameters():
            if name.replace("_fsdp_wrapped_module.", "") == NAMED:
                one.grad = None
        if self.wanted.options.get("use_orig_params") is False:
            layer, name = NAMED.split(".mlp.")
            (flat,) = _flats(self.model.get_submodule(layer))
            info = flat._shard_param_infos[flat._fqns.index(f"mlp.{name}")]
            if info.in_shard:
                flat.grad[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard].zero_()


class Branched(torch.nn.Module):
    """A model with a branch of its own loss."""

    def __init__(self, llama: torch.nn.Module) -> None:
        super().__init__()
        self.llama, self.branch = llama, torch.nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, *, branch: bool) -> Any:
        scores = self.llama(input_ids=input_ids).logits
        return scores, self.branch(scores.detach()).square().mean() if branch else 0.0


def _scores(output: Any) -> Any:
    """The logits, and what else enters the loss."""
    return output if isinstance(output, tuple) else (output.logits, 0.0)


def _llama(kind: str) -> Any:
    from trainfix.proofs.token_experiment import tiny_llama

    model: Any = tiny_llama(num_hidden_layers=2, tie_word_embeddings=kind == "tied")
    if kind in ("frozen", "frozen layer"):
        model.model.layers[0].requires_grad_(False)
    if kind == "frozen":
        model.model.embed_tokens.requires_grad_(False)
    return model


def _sharded(model: Any, wanted: Configuration) -> Any:
    return _fsdp1(model, **wanted.options) if wanted.kind == "fsdp1" else _fsdp2(model, wanted, **wanted.options)


def _fsdp1(
    model: Any, *, strategy: str, offload: bool = False, bf16: bool = False, linear: bool = False, **options: Any
) -> Any:
    """linear: every linear layer is wrapped too, the output matrix among them."""
    from torch.distributed import fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    if offload:
        options["cpu_offload"] = fsdp.CPUOffload(offload_params=True)
        # What keeps it from a machine without an accelerator: it pins the shards, and waits for a stream.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
        torch.cpu.Stream.synchronize = lambda _: None
    if bf16:
        options["mixed_precision"] = fsdp.MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16)
    return fsdp.FullyShardedDataParallel(
        model,
        sharding_strategy=fsdp.ShardingStrategy[strategy],
        auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0]), *([torch.nn.Linear] if linear else [])}),
        device_id=torch.device("cpu"),
        **options,
    )


def _fsdp2(
    model: Any,
    wanted: Configuration,
    *,
    offload: bool = False,
    bf16: bool = False,
    head: bool = False,
    **options: Any,
) -> Any:
    """head: the output matrix is sharded by itself too."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    shape, names = ((2, 1), ("replicate", "shard")) if wanted.kind == "hybrid" else ((2,), ("shard",))
    options["mesh"] = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in [*model.model.layers, *([model.lm_head] if head else [])]:
        fully_shard(layer, **options)
    if wanted.model == "branch":
        model = Branched(model)
        fully_shard(model.branch, **options)
    fully_shard(model, **options)
    return model


def _flats(model: Any) -> list[Any]:
    handles = [getattr(one, "_handle", None) for one in model.modules()]
    return [one.flat_param for one in handles if one is not None]


def _accumulated(model: Any) -> list[torch.Tensor | None]:
    """Every place where gradients are added up on this rank, in one order."""
    if flats := _flats(model):
        return [flat.grad for flat in flats]
    found: list[torch.Tensor | None] = []
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
        for one in [] if group is None else group.fsdp_params:
            sharded = one.sharded_param.grad
            found += [None if sharded is None else sharded.to_local(), one.unsharded_accumulated_grad]
            found.append(one._unsharded_param.grad)
    return found


def _whole(model: Any) -> list[torch.Tensor]:
    groups = [one._get_fsdp_state()._fsdp_param_group for one in model.modules() if hasattr(one, "_get_fsdp_state")]
    parameters = [one for group in groups if group is not None for one in group.fsdp_params]
    return [one._unsharded_param for one in parameters if hasattr(one, "_unsharded_param")]


@contextlib.contextmanager
def _listening(run: Run, notes: list[str]) -> Iterator[Any]:
    import trainfix
    from trainfix import settings
    from trainfix.ledger.sink import Sink
    from trainfix.ledger.watch import Watch

    with mock.patch.object(Sink, "note", lambda _, text: notes.append(text)):
        if run.wanted.how == "off":
            yield ()
        elif run.wanted.how == "told":
            with trainfix.ledger(run.model, run.optimizer) as verdicts:
                yield verdicts
        else:
            watch = Watch(settings.Ledger(first=2), Sink(None))
            watch.begin()
            yield watch.verdicts
            watch.end()


def _words(length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def _row(verdict: Any) -> dict[str, Any]:
    found = verdict.finding
    return {
        "window": found.window,
        "state": verdict.state,
        "problems": verdict.problems,
        "remarks": verdict.remarks,
        "unclear": verdict.unclear,
        "backwards": found.backwards,
        "coefficients": found.balance.coefficients,
        "earlier": found.balance.earlier,
        "outliers": sorted(found.outliers),
        "residual": found.balance.residual,
        "apart": found.apart,
        "parameters": found.parameters,
        "tokens": None if verdict.tokens is None else verdict.tokens.verdict,
        "counted": 0 if verdict.tokens is None else sum(verdict.tokens.tokens.values()),
        "scale": verdict.scale,
    }


def _hooks(model: Any) -> list[str]:
    """trainfix's hooks that are still there: on modules, on tensors, on everything."""
    from torch.nn.modules import module as modules
    from torch.optim import optimizer

    tensors = [*model.parameters(), *_flats(model), *_whole(model)]
    tables = [getattr(modules, name) for name in vars(modules) if name.startswith("_global_") and "hooks" in name]
    tables += [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
    tables += [one._forward_pre_hooks for one in model.modules()] + [one._forward_hooks for one in model.modules()]
    tables += [one._backward_hooks for one in tensors]
    hooks = [hook for table in tables if isinstance(table, dict) for hook in table.values()]
    return [repr(hook) for hook in hooks if str(getattr(hook, "__module__", "")).startswith("trainfix")]


def _digest(model: Any) -> str:
    """Of the bytes of what this rank holds of every parameter."""
    held = [one.to_local() if hasattr(one, "to_local") else one for one in model.parameters()]
    return hashlib.sha256(b"".join(one.detach().contiguous().numpy().tobytes() for one in held)).hexdigest()


def main() -> None:
    rank, port, asked = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, values in json.loads(asked).items():
        result = Run(Configuration(**values), int(rank)).result()
        ranks: list[Any] = [None] * RANKS
        torch.distributed.all_gather_object(ranks, result)
        of_all = {key: [one[key] for one in ranks] for key in ("notes", "hooks", "parameters")}
        if rank == "0":
            print(json.dumps({"name": name, **result, **of_all}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
