"""Where a causal language model makes logits of hidden states: found in a module tree, by transformers' own names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trainfix.measure.next_token import Output

_OF_MASKED = ("MaskedLM", "ForPreTraining")  # these predict the masked token, not the next one


class LanguageModel(NamedTuple):
    """module: what is called with the inputs and labels. body: makes the hidden states, None where it has no name of
    its own. head: the output matrix. embedding: gets the input ids."""

    module: torch.nn.Module
    body: torch.nn.Module | None
    head: torch.nn.Module
    embedding: torch.nn.Module

    @property
    def has_encoder(self) -> bool:
        """Whether masks and labels are not those of the ids that go in front of the output matrix."""
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False))

    def output(self) -> Output | None:
        """How logits are made; None while this rank holds only a part of the matrix."""
        matrix: Any = self.head.weight
        rows, columns = self.embedding_shape()
        whole = matrix.dim() == 2 and tuple(matrix.shape) == (rows, columns) and not hasattr(matrix, "placements")
        if not whole or matrix.untyped_storage().nbytes() < matrix.numel() * matrix.element_size():
            return None
        bias: Any = getattr(self.head, "bias", None)
        return Output(matrix, bias, *_transformed(self.module))

    def embedding_shape(self) -> tuple[int, int]:
        """[vocabulary, hidden] of the whole output matrix."""
        weight: Any = self.head.weight
        shape = getattr(weight, "ds_shape", weight.shape)  # DeepSpeed's stage 3 leaves an empty tensor behind
        rows = getattr(self.head, "out_features", shape[0])
        return int(rows), int(getattr(self.head, "in_features", shape[-1]))


def find(root: torch.nn.Module) -> LanguageModel | None:
    """The outermost causal language model in `root`; None where there is none that we can read."""
    for module in root.modules():
        found = _of_transformers(module)
        if found is not None:
            return found
    is_masked = any(word in type(one).__name__ for one in root.modules() for word in _OF_MASKED)
    return None if is_masked else _by_shape(root)


def _of_transformers(module: Any) -> LanguageModel | None:
    if not (hasattr(type(module), "get_output_embeddings") and hasattr(type(module), "get_input_embeddings")):
        return None
    if any(word in type(module).__name__ for word in _OF_MASKED):
        return None
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        embedding = module.get_decoder().get_input_embeddings()
    body = getattr(module, "base_model", None)
    if not (_holds_matrix(head) and isinstance(embedding, torch.nn.Module)):
        return None
    return LanguageModel(module, None if body is module else body, head, embedding)


def _by_shape(root: torch.nn.Module) -> LanguageModel | None:
    """Any other model with one embedding, and one linear layer that has as many rows."""
    embeddings = [one for one in root.modules() if isinstance(one, torch.nn.Embedding)]
    for embedding in embeddings:
        sizes = embedding.num_embeddings, embedding.embedding_dim
        heads = [
            one
            for one in root.modules()
            if isinstance(one, torch.nn.Linear) and (one.out_features, one.in_features) == sizes
        ]
        if len(heads) == 1:
            return LanguageModel(root, None, heads[0], embedding)
    return None


def _holds_matrix(head: Any) -> bool:
    """Not one that an adapter (LoRA) changes: its logits are not those of its weight alone."""
    linear = isinstance(head, torch.nn.Linear) or "weight" in getattr(head, "_parameters", ())
    return linear and not hasattr(head, "base_layer")


def _transformed(module: Any) -> tuple[float, float | None]:
    """The scale and the soft cap of the logits, from the model's configuration."""
    config: Any = getattr(module, "config", None)
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kind = str(getattr(text, "model_type", ""))
    scale = 1.0
    if kind.startswith("granite") and getattr(text, "logits_scaling", None):
        scale = 1 / float(text.logits_scaling)
    elif kind.startswith("cohere") and getattr(text, "logit_scale", None):
        scale = float(text.logit_scale)
    elif kind.startswith("falcon_h1"):
        scale = float(getattr(text, "lm_head_multiplier", 1.0))
    cap = getattr(text, "final_logit_softcapping", None)
    return scale, float(cap) if cap else None
