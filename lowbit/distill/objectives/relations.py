"""Relations between a layer's queries, keys and values: no equal widths, no equal depths (MiniLM).

R_XY = softmax(X Y^T / sqrt(d / A)) of each of A relation heads, over real keys
L    = sum over pairs XY of mean over heads and real tokens of KL(teacher's R_XY || student's R_XY)

MiniLM (Wang et al. 2020): pairs QK and VV, as many relation heads as attention heads, at the last layers.
MiniLMv2 (Wang et al. 2021): QQ, KK and VV, 48 relation heads of BERT-base, 64 of BERT-large, where the teacher's layer
is 21 of 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ... import models
from .base import Batch, full, need_teacher, token_mask

WHAT = "RelationLoss"


@dataclass
class RelationLoss:
    """KL divergence of relations between queries, keys and values of one layer, a mean over examples.

    Nothing behind a layer's queries, keys and values is reached: the rest of the layer (attention output, FFN and
    LayerNorms), later layers and the pooler get no gradient, and stay as they are until they are fine-tuned. A low-bit
    student needs another objective beside this, such as `HiddenStateLoss(map="last")`.

    Args:
        weight: factor of the loss.
        pairs: what is related: two of the letters Q, K, V each.
        relation_heads: A, which has to divide both models' widths of queries; None: the teacher's attention heads.
        student_layer, teacher_layer: from 1; None: the last.
    """

    weight: float = 1.0
    pairs: Sequence[str] = ("QQ", "KK", "VV")
    relation_heads: int | None = None
    student_layer: int | None = None
    teacher_layer: int | None = None
    name: str = "relation"
    needs: tuple[str, ...] = ("qkv",)

    def __post_init__(self) -> None:
        pairs = [] if isinstance(self.pairs, str) else [*self.pairs]
        if not pairs or not all(len(pair) == 2 and set(pair) <= set("QKV") for pair in pairs):
            raise ValueError(f"{WHAT}: pairs={self.pairs!r}; accepted: a list of two letters of Q, K, V each: 'QK', ..")
        self.heads = self.relation_heads

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for layers that a model does not have, heads that do not divide its width, no teacher."""
        teacher = need_teacher(WHAT, teacher)
        heads = self.relation_heads or teacher.config.num_attention_heads
        for which, model, layer in (("student", student, self.student_layer), ("teacher", teacher, self.teacher_layer)):
            layers = [each for _, each in models.layers(model)]
            if layer is not None and not 1 <= layer <= len(layers):
                raise ValueError(f"{WHAT}: {which}_layer={layer}; accepted: 1 to {len(layers)}, or None for the last")
            query: Any = layers[-1].get_submodule(models.describe(model).projections[0])
            _refuse_width(which, query.out_features, heads)

    def build(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Take the teacher's number of heads where none was given."""
        self.heads = self.relation_heads or teacher.config.num_attention_heads

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        if self.heads is None:
            raise ValueError(f"{WHAT}: pass relation_heads, or call build(student, teacher), as the trainer does")
        ours, theirs = (
            dict(zip("QKV", map(full, outputs.qkv[-1 if layer is None else layer - 1]), strict=True))
            for outputs, layer in ((student, self.student_layer), (teacher, self.teacher_layer))
        )
        mask = token_mask(batch, ours["Q"])
        loss: Any = 0.0
        for x, y in map(tuple, self.pairs):
            s, t = (_log_relations(each[x], each[y], self.heads, mask) for each in (ours, theirs))
            rows = (t.exp() * (t - s)).sum(-1).mean(1)  # [B, S]
            examples = rows.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
            loss = loss + examples.mean()
        return self.weight * loss


def _refuse_width(which: str, width: int, heads: int) -> None:
    if width % heads:
        fitting = ", ".join(str(each) for each in range(1, width + 1) if width % each == 0)
        raise ValueError(
            f"{WHAT}: {heads} relation heads do not divide the {which}'s width of {width}; accepted: relation_heads of "
            f"{fitting} that divide the other model's width too"
        )


def _log_relations(x: torch.Tensor, y: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """log R of [B, S, width] twice: [B, heads, S, S]; keys that `mask` [B, S] calls padding have probability 0."""
    x, y = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (x, y))
    scores = x @ y.transpose(2, 3) / x.shape[-1] ** 0.5
    return F.log_softmax(scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min), -1)
