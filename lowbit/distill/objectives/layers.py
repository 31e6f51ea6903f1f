"""Layers of two models, brought together by a layer map."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .. import layer_maps
from .base import sizes_of


def check_layers(
    spec: Any,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    what: str,
    combine: Collection[str] = ("one",),
    weights: Sequence[float] | None = None,
) -> layer_maps.LayerMap | None:
    """The map for two models, None where their configurations name no number of layers.

    Raises:
        ValueError: a map for another depth, or that combines layers in another way than `what` can; another number of
            weights than of student layers.
    """
    counts = sizes_of("num_hidden_layers", student, teacher)
    return None if counts is None else resolved(spec, *counts, what, combine, weights)


def resolved(
    spec: Any,
    student: int,
    teacher: int,
    what: str,
    combine: Collection[str] = ("one",),
    weights: Sequence[float] | None = None,
) -> layer_maps.LayerMap:
    """A map for so many layers, of those that `what` can combine; raises as `check_layers`."""
    found = layer_maps.resolve(spec, student, teacher, what)
    if found.combine not in combine:
        raise ValueError(f"{what}: a layer map with combine={found.combine!r}; accepted: {', '.join(combine)}")
    if weights is not None and len(weights) != student:
        raise ValueError(f"{what}: {len(weights)} layer_weights for {student} student layers; one for each is needed")
    return found


def weight_of(weights: Sequence[float] | None, layer: int) -> float:
    """Of a student layer from 1; the embedding output (0) has none of its own."""
    return 1.0 if weights is None or layer == 0 else float(weights[layer - 1])


def average(states: Sequence[torch.Tensor]) -> torch.Tensor:
    return states[0] if len(states) == 1 else torch.stack([*states]).mean(0)


def attend(
    state: torch.Tensor, states: Sequence[torch.Tensor], scale: bool, detach: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A mixture of teacher layers by dot products with the student's state (ALP-KD): what it is, and its entropy.

    Args:
        state: the student's, [B, S, D].
        states: the teacher's, each [B, S, D].
        scale: divide dot products by sqrt(D).
        detach: no gradient to the student by way of the weights.

    Returns:
        The mixture [B, S, D], and the entropy of the weights [B, S] in nats, without gradient.
    """
    stacked = torch.stack([*states], 2)
    scores = (stacked * state.unsqueeze(2)).sum(-1)
    weights = F.softmax(scores / state.shape[-1] ** 0.5 if scale else scores, -1)
    if detach:
        weights = weights.detach()
    return (weights.unsqueeze(-1) * stacked).sum(2), torch.special.entr(weights.detach()).sum(-1)
