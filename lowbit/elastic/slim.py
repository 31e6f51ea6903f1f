"""Half width: keep the most important attention heads and FFN neurons (DynaBERT, Hou et al. 2020, one-shot core)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .. import models
from ..files import saving
from ..files.stage import current_config, own_config
from . import layout
from .importance import importance, magnitude, top

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def slim(
    model: PreTrainedModel,
    width: float = 0.5,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    definition: str = "per_example",
) -> PreTrainedModel:
    """Keep `width` of the heads and FFN neurons of every layer, the most important ones, in their order and in place.

    Args:
        model: float, of an architecture that `lowbit.models` describes, with attention by transformers' interface.
        width: fraction kept, in (0, 1]; counts are rounded half to even, at least 1.
        dataloader: a few batches with labels for the first-order importance; None ranks by the L2 norm of the weights.
        definition: of importance, see `lowbit.importance`.

    Returns:
        The same model, smaller; it runs, saves and loads like any other.

    Raises:
        TypeError, ValueError: not a supported float model, already slimmed, a width outside (0, 1], batches without
            labels or that are no mappings, or an empty dataloader.
    """
    layout.describe(model, "slim")
    config = current_config(model.base_model)
    if config.num_attention_heads is not None:
        raise ValueError("slim takes a float model of full width, this one is already slimmed")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
        raise ValueError(f"width={width!r}; accepted: a number greater than 0, at most 1")
    ranks = magnitude(model) if dataloader is None else importance(model, dataloader, definition)
    heads = max(1, round(width * model.config.num_attention_heads))
    neurons = max(1, round(width * models.intermediate_size(model)))
    kept = [top(each, heads) for each in ranks.heads]
    own_config(model)
    layout.select(model, kept, [top(each, neurons) for each in ranks.neurons])
    return saving.attach(model, config.replace(num_attention_heads=heads, kept_heads=[each.tolist() for each in kept]))
