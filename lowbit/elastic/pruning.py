"""Head pruning: the least important heads go, wherever they are (Michel et al. 2019, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..files import saving
from ..files.stage import current_config, own_config
from . import layout
from .importance import importance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune_heads(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    ratio: float,
    definition: str = "per_example",
    normalize: bool = True,
    exact: bool = False,
    at_least: int = 1,
) -> PreTrainedModel:
    """Remove a share of all attention heads, the least important ones, in place; layers may keep different numbers.

    Args:
        model: float, of an architecture that `lowbit.models` describes, with attention by transformers' interface. It
            may have been pruned before.
        data: a few batches with labels; a list, or what can be gone through again, with `exact`.
        ratio: share removed of the heads that there are, in [0, 1); their number is rounded half to even.
        definition: of importance, see `lowbit.importance`.
        normalize: divide importances by their L2 norm within a layer before layers are compared (published).
        exact: take the importance anew after every removed head, instead of once.
        at_least: heads that every layer keeps, from 1. Published code may remove all of a layer, which is refused here.

    Returns:
        The same model, smaller; it runs, saves and loads like any other.

    Raises:
        TypeError, ValueError: not a supported float model, a ratio outside [0, 1) or that leaves fewer heads than
            `at_least` a layer, data as of `lowbit.importance`.
    """
    layout.describe(model, "prune_heads")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio!r}; accepted: a number from 0, below 1")
    if isinstance(at_least, bool) or not isinstance(at_least, int) or at_least < 1:
        raise ValueError(f"at_least={at_least!r}; accepted: a whole number from 1")
    sizes = layout.sizes(model)
    total = sum(heads for heads, _ in sizes)
    remove, removable = round(ratio * total), sum(max(0, heads - at_least) for heads, _ in sizes)
    if remove > removable:
        raise ValueError(
            f"ratio={ratio} removes {remove} of {total} heads, and at_least={at_least} a layer leaves {removable} to "
            f"remove; accepted: up to {removable / total:.3g}"
        )
    kept = [[*range(heads)] for heads, _ in sizes]
    trial = copy.deepcopy(model) if exact else model
    for number in range(remove):
        if exact or not number:
            found = importance(trial, data, definition)
            scores = (found.normalized() if normalize else found).heads
            values = [dict(zip(own, each.tolist(), strict=True)) for own, each in zip(kept, scores, strict=True)]
        layer, head = min(
            ((layer, head) for layer, own in enumerate(kept) if len(own) > at_least for head in own),
            key=lambda place: values[place[0]][place[1]],
        )
        place = kept[layer].index(head)
        del kept[layer][place]
        if exact:
            now = enumerate(layout.sizes(trial))
            _keep(trial, [[p for p in range(heads) if (each, p) != (layer, place)] for each, (heads, _) in now])
    return _pruned(model, kept) if remove else model


def _keep(model: PreTrainedModel, heads: list[list[int]]) -> None:
    device = next(model.parameters()).device
    neurons = [torch.arange(size, device=device) for _, size in layout.sizes(model)]
    layout.select(model, [torch.tensor(each, device=device) for each in heads], neurons)


def _pruned(model: PreTrainedModel, kept: list[list[int]]) -> PreTrainedModel:
    """Take these heads out of the model for good, and note which ones they were."""
    config = current_config(model.base_model)
    before = config.kept_heads or [[*range(heads)] for heads, _ in layout.sizes(model)]
    known = config.num_attention_heads is None or config.kept_heads is not None
    names = [[own[head] for head in heads] for own, heads in zip(before, kept, strict=True)] if known else None
    own_config(model)
    _keep(model, kept)
    counts = [len(each) for each in kept]
    counts_or_one: Any = counts[0] if len(set(counts)) == 1 else counts
    return saving.attach(model, config.replace(num_attention_heads=counts_or_one, kept_heads=names))
