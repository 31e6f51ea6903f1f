"""Which layers a shallower model keeps: rules by name, as data.

dynabert      floor(i / depth), i = 0, 1, ..: layers 3, 7 and 11 of 12 go at 0.75, every other one at 0.5
              (Hou et al. 2020, section 2.2, and its code)
top, bottom   the last, or the first, layers go                      (Sajjad et al. 2020, "Poor Man's BERT", and below)
alternate     every other layer goes, from the last one down: at most half
symmetric     the layers in the middle go
contribution  the layers go whose output is most like their input

All but `dynabert` are named by what they drop. Layers count from 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .. import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (layers, how many are kept, depth) -> which
_RULES: dict[str, Callable[[int, int, float], list[int]]] = {
    "dynabert": lambda layers, kept, depth: [math.floor(i / depth + 1e-9) for i in range(kept)],
    "top": lambda layers, kept, depth: [*range(kept)],
    "bottom": lambda layers, kept, depth: [*range(layers - kept, layers)],
    "alternate": lambda layers, kept, depth: [
        index for index in range(layers) if (layers - 1 - index) % 2 or (layers - 1 - index) // 2 >= layers - kept
    ],
    "symmetric": lambda layers, kept, depth: [*range(-(-kept // 2)), *range(layers - kept // 2, layers)],
}
STRATEGIES = (*_RULES, "contribution")


def kept_layers(strategy: str, layers: int, depth: float, similarity: Sequence[float] | None = None) -> tuple[int, ...]:
    """The layers that a model of `depth` keeps, ascending.

    Args:
        strategy: "dynabert", "top", "bottom", "alternate", "symmetric" or "contribution", see the top of this file.
        layers: how many there are.
        depth: share kept, in (0, 1]; round(layers * depth) of them, half to even.
        similarity: for "contribution", of each layer's output with its input (`layer_similarity`).

    Raises:
        ValueError: another strategy, a depth that keeps none, more than half dropped by "alternate", or no similarity.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"layers={strategy!r}; accepted: {', '.join(map(repr, STRATEGIES))}, or numbers of layers")
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 < depth <= 1:
        raise ValueError(f"depth={depth!r}; accepted: a number greater than 0, at most 1")
    kept = round(layers * depth)
    if kept < 1:
        raise ValueError(f"depth={depth} keeps none of {layers} layers; accepted: from {1 / layers:.3g}")
    if strategy == "alternate" and 2 * (layers - kept) > layers:
        raise ValueError(f"layers='alternate' drops at most half of {layers} layers, and depth={depth} keeps {kept}")
    if strategy != "contribution":
        return tuple(_RULES[strategy](layers, kept, depth))
    if similarity is None or len(similarity) != layers:
        raise ValueError("layers='contribution' needs data, from which to see what each layer changes")
    return tuple(sorted(sorted(range(layers), key=lambda index: similarity[index])[:kept]))


@torch.inference_mode()
def layer_similarity(model: PreTrainedModel, data: Iterable[Mapping[str, Any]]) -> list[float]:
    """Mean cosine of each layer's output [B, S, H] with its input, over the real tokens of some batches.

    Args:
        model: any stage; it runs in eval mode, and its mode is left as it was.
        data: batches, mappings; labels are not needed.

    Raises:
        TypeError, ValueError: no encoder, or no batch.
    """
    models.check(model)
    was_training, device = model.training, next(model.parameters()).device
    total: torch.Tensor | None = None
    tokens = 0.0
    try:
        model.eval()
        for batch in data:
            inputs = {name: x.to(device) for name, x in batch.items() if torch.is_tensor(x) and name != "labels"}
            states = model(**inputs, output_hidden_states=True).hidden_states
            mask = inputs.get("attention_mask")
            mask = torch.ones(states[0].shape[:2], device=device) if mask is None else mask.reshape(states[0].shape[:2])
            cosines = [F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in itertools.pairwise(states)]
            found = torch.stack([(cosine * mask).sum() for cosine in cosines])
            total, tokens = found if total is None else total + found, tokens + float(mask.sum())
    finally:
        model.train(was_training)
    if total is None:
        raise ValueError("the data are empty: the similarity of layers needs at least one batch")
    return (total / tokens).tolist()
