"""Layers of two models, paired by a layer map."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedModel

from ...nn.attention import NAME as LOWBIT_ATTENTION
from .. import layer_maps
from .base import sizes_of


def check_layers(
    spec: Any, student: PreTrainedModel, teacher: PreTrainedModel, what: str, combine: Collection[str] = ("one",)
) -> None:
    """Raise ValueError for a map for another depth, or that combines layers in another way than `what` can."""
    if counts := sizes_of("num_hidden_layers", student, teacher):
        resolved(spec, *counts, what, combine)


def resolved(
    spec: Any, student: int, teacher: int, what: str, combine: Collection[str] = ("one",)
) -> layer_maps.LayerMap:
    """A map for so many layers, of those that `what` can combine."""
    found = layer_maps.resolve(spec, student, teacher, what)
    if found.combine not in combine:
        raise ValueError(f"{what}: a layer map with combine={found.combine!r}; accepted: {', '.join(combine)}")
    return found


def paired(spec: Any, student: Sequence[Any], teacher: Sequence[Any], what: str) -> list[tuple[Any, Any]]:
    """(student's, teacher's) of each layer that is taught, of what the two models return for layers 1, 2, ..."""
    if not student or not teacher:
        raise ValueError(
            f"{what}: {len(student)} student layers, {len(teacher)} teacher layers in the outputs; "
            f'scores need model.set_attn_implementation("{LOWBIT_ATTENTION}")'
        )
    taught = resolved(spec, len(student), len(teacher), what).taught()
    return [(student[layer - 1], teacher[row[0] - 1]) for layer, row in taught]
