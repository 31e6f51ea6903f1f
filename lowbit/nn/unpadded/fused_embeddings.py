"""`FusedEmbeddings`: BERT's embeddings of a packed model in one operation."""

from __future__ import annotations

import copy
import inspect
from contextvars import Context
from typing import Any

import torch
from torch import nn

from lowbit_kernels import embedding_layernorm

from .._packed import refuse_tracing
from ..embedding import PackedEmbedding
from .aside import trying
from .proof import is_half
from .snapshot import Snapshot, any_global_hook
from .stand_in import StandIn

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_PAST = ("past_key_values_length", "cache_length")  # up to transformers 5.23, and since
_ARGUMENTS = {"input_ids", "token_type_ids", "position_ids", "inputs_embeds", *_PAST}
_TOLERANCE = 1e-4  # relative, of a token: nothing is quantized on the way, so there is rounding only


class FusedEmbeddings(StandIn):
    """Stands in for the embeddings of a fused model: all tables and LayerNorm in one operation.

    The modules stay what and where they were; they run instead for `inputs_embeds`, dropout, gradients, packed position
    embeddings, float64 and offloaded parameters, where hooks would see them run, and where they compute something else.

    Args:
        embeddings: of a Hugging Face model: `word_embeddings`, `position_embeddings`, `LayerNorm`, and, but in
            DistilBERT, `token_type_embeddings`. A padding row in the table of positions means RoBERTa's positions: they
            count from the row after it, over the tokens that are no padding.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__(embeddings)
        self._names = [*inspect.signature(embeddings.forward).parameters]
        norm: Any = embeddings.LayerNorm
        if not hasattr(embeddings, "token_type_embeddings"):
            # Only then: accelerate cannot offload the buffers of a module where one is None.
            self.register_buffer("_no_types", torch.zeros_like(norm.weight.detach())[None], persistent=False)
        self._first_type: torch.Tensor  # the id of every token where none are given
        self.register_buffer("_first_type", norm.weight.new_zeros(1, dtype=torch.long), persistent=False)
        self._proof: tuple[Snapshot, str | None] = (Snapshot(), None)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """ids [B, S] -> float [B, S, H]; arguments as of the modules."""
        refuse_tracing()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        input_ids = given.get("input_ids")
        word: Any = self.word_embeddings
        position: Any = self.position_embeddings
        norm: Any = self.LayerNorm
        if (
            input_ids is None
            or given.get("inputs_embeds") is not None
            or not given.keys() <= _ARGUMENTS
            or self.training
            or self.is_replica
            or not isinstance(word, PackedEmbedding)
            or not has_weights(self)
            or (torch.is_grad_enabled() and any(p.requires_grad for p in (norm.weight, position.weight)))
            or norm.weight.device != input_ids.device
            or norm.weight.dtype == torch.float64
            or self.prevented() is not None
        ):
            return self.original.forward(*args, **kwargs)
        return self.run(given)

    def run(self, given: dict[str, Any]) -> torch.Tensor:
        """All in one operation; arguments of the modules by name."""
        input_ids, position_ids = given["input_ids"], given.get("position_ids")
        word: Any = self.word_embeddings
        position: Any = self.position_embeddings
        norm: Any = self.LayerNorm
        if position_ids is None:
            past = next((given[name] for name in _PAST if name in given), 0)
            position_ids = self._position_ids(input_ids, past)
        token_type_ids = given.get("token_type_ids")
        if token_type_ids is None:
            token_type_ids = self._first_type
        own_types: Any = self._modules.get("token_type_embeddings")
        types: Any = self._no_types if own_types is None else own_types.weight
        table: tuple[torch.Tensor, torch.Tensor, int] = word.table()
        return embedding_layernorm(
            input_ids,
            *table,
            token_type_ids,
            types,
            position_ids,
            position.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            out_dtype=norm.weight.dtype,
        )

    def prevented(self) -> str | None:
        """Why the embeddings are not run in one operation, None where they are; looked at as in `UnpaddedEncoder`."""
        if torch.compiler.is_compiling():
            return "the model is being traced"
        snapshot, reason = self._proof
        self._original[0].__dict__["training"] = self.training
        compared = snapshot.compare()
        if compared == "changed":
            snapshot = Snapshot([self._original[0], *(module for module in self.modules() if module is not self)])
            reason = Context().run(_problem, self)
            self._proof = snapshot, reason
            compared = snapshot.compare()
        if reason is None and (compared == "mode" or snapshot.hooked or any_global_hook()):
            return "embeddings with hooks, or in train mode"
        return reason

    def _position_ids(self, input_ids: torch.Tensor, past: int) -> torch.Tensor:
        """int64 [B or 1, S]."""
        padding: Any = self.position_embeddings.padding_idx  # type: ignore[union-attr]
        if padding is None:
            own: Any = self.position_ids
            return own[:, past : past + input_ids.shape[1]]
        real = input_ids.ne(padding).long()
        return (real.cumsum(1) + past) * real + padding


def has_weights(embeddings: nn.Module) -> bool:
    """Whether positions and norm have the tensors that one operation reads, whatever else they are."""
    parts = (getattr(embeddings, name, None) for name in ("position_embeddings", "LayerNorm"))
    return all(torch.is_tensor(getattr(part, "weight", None)) for part in parts)


def _problem(embeddings: FusedEmbeddings) -> str | None:
    """Why one operation cannot do what the modules do, in words."""
    children = dict(embeddings.named_children())
    if type(children.get("word_embeddings")) is not PackedEmbedding:
        return "the word embedding is not packed"
    for name in _TABLES[1:]:
        if name in children and type(children[name]) is not nn.Embedding:
            return f"{name} is a {type(children[name]).__name__}, expected torch.nn.Embedding"
    norm: Any = children["LayerNorm"]
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return f"LayerNorm is {norm}, expected torch.nn.LayerNorm with weight and bias"
    for name, module in embeddings.named_modules():
        if name and name.split(".")[0] not in (*_TABLES, "LayerNorm") and (module._parameters or module._buffers):
            return f"{name} ({type(module).__name__}) has parameters of its own"
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            return f"{name} has a forward of its own"
    tensors = [*embeddings.parameters(), *embeddings.buffers()]
    if any(tensor.is_meta for tensor in tensors):  # offloaded: what is not here is not tried
        return None
    try:
        if any(tensor.device.type != "cpu" or is_half(tensor) for tensor in tensors):
            embeddings = copy.deepcopy(embeddings).cpu().float()
        return _difference(embeddings)
    except Exception as error:  # of modules that may be anything
        return f"they cannot be tried on a few ids ({type(error).__name__}: {error})"


def _difference(embeddings: FusedEmbeddings) -> str | None:
    """Whether ids up to the longest sequence, padding among them, have the same embeddings both ways."""
    word: Any = embeddings.word_embeddings
    position: Any = embeddings.position_embeddings
    types: Any = embeddings._modules.get("token_type_embeddings")
    first = 0 if position.padding_idx is None else position.padding_idx + 1
    generator = torch.Generator().manual_seed(0)

    def draw(end: int) -> torch.Tensor:
        return torch.randint(end, (2, position.num_embeddings - first), generator=generator, device="cpu")

    ids = draw(word.num_embeddings)
    if word.padding_idx is not None:
        ids[0, ids.shape[1] // 2 :: 3] = word.padding_idx
    calls: list[dict[str, Any]] = [
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": draw(position.num_embeddings)},
    ]
    if types is not None:
        calls[1]["token_type_ids"] = draw(types.num_embeddings)
    with trying(embeddings) as embeddings:
        for given in calls:
            expected = embeddings.original.forward(**given).double()
            error = (embeddings.run(given).double() - expected).norm(dim=-1)
            if not bool((error <= _TOLERANCE * expected.norm(dim=-1).clamp(min=1e-12)).all()):  # not `>`: NaN
                return f"they compute something else with {', '.join(given)} ({float(error.max()):.2g} off)"
    return None
