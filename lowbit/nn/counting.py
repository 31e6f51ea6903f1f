"""How many parameters a model has, whatever holds them: packed codes are no parameters to torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from . import PackedEmbedding, QuantEmbedding, QuantLinear
from ._packed import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """What `PreTrainedModel.num_parameters` counts of the float model that a prepared or packed one was made of.

    A quantized weight counts as the N x K numbers that it stands for: one a code, a split pair once, scales not at all.
    A decoder that transformers ties to the word embedding counts once, too, though packing gave it weights of its own.

    Args:
        model: in any stage.
        only_trainable: count the floats that require gradients: no codes, but a decoder that packing untied.
        exclude_embeddings: leave out the tables of `torch.nn.Embedding` and what quantization put in their place.
    """
    modules = dict(model.named_modules())
    pairs = {f"{name}.weight" for name, module in modules.items() if _is_pair(module)}
    counts = {
        name: parameter.numel() // (2 if name in pairs else 1)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not only_trainable
    }
    if not only_trainable:
        codes = {f"{name}.weight": _codes(module) for name, module in modules.items() if isinstance(module, Packed)}
        counts |= codes
        for name in _untied(model, counts, {*codes, *pairs}):
            del counts[name]
    if exclude_embeddings:
        kinds = (nn.Embedding, QuantEmbedding, PackedEmbedding)
        for name in [name for name, module in modules.items() if isinstance(module, kinds)]:
            counts.pop(f"{name}.weight", None)
    return sum(counts.values())


def _is_pair(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear | QuantEmbedding) and module.weight.dim() == 3


def _codes(module: Packed) -> int:
    return module.weight.shape[0] * module.row_length


def _untied(model: PreTrainedModel, counts: dict[str, int], tables: set[str]) -> list[str]:
    """Parameters that transformers ties to others, of a model whose word embedding can be shared no longer."""
    ties: Any = model._tied_weights_keys or {}
    if tables.isdisjoint(ties.values()):
        return []
    return [name for name, source in ties.items() if name in counts and counts[name] == counts.get(source)]
