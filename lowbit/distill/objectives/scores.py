"""Distance of attention scores, summed over layers.

mse             mean of (A_s - A_t)^2, A before softmax                      (TernaryBERT eq. 7, TinyBERT)
cross_entropy   mean over rows of -sum_keys softmax(A_t) log softmax(A_s)    (MobileBERT)

A constant added to a row of scores changes the first and not the second, nor what the model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...nn.attention import NAME as LOWBIT_ATTENTION
from .. import layer_maps
from .base import Batch, full, need_one_of, need_teacher
from .layers import average, check_layers, resolved, weight_of

WHAT = "AttentionScoreLoss"


@dataclass
class AttentionScoreLoss:
    """Distance of the attention scores, summed over layers; padded queries and keys do not count.

    Where the numbers of heads differ both are averaged over heads, since heads cannot be paired. For a slimmed student
    they are equal: of the teacher's scores `DistillationTrainer` takes those of the heads that `lowbit.slim` kept.

    Args:
        weight: factor of the loss.
        include_padding: the published modes. "mse": set masked keys to 0 in both and average over all entries;
            "cross_entropy": average over the rows of padded queries too.
        map: which teacher layer teaches which student layer, or whose mean: a name, list, file or `LayerMap` of
            `lowbit.distill.layer_maps`.
        distance: "mse" of the scores before softmax, or "cross_entropy" of rows after it.
        layer_weights: a factor for each student layer; 0 leaves a layer out (MobileBERT's gates).
    """

    weight: float = 1.0
    include_padding: bool = False
    map: Any = "uniform"
    distance: str = "mse"
    layer_weights: Sequence[float] | None = None
    name: str = "attention"
    needs: tuple[str, ...] = ("scores",)

    def __post_init__(self) -> None:
        need_one_of(f"{WHAT}: distance", self.distance, ("mse", "cross_entropy"))
        self.map = layer_maps.opened(self.map)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for a map for other depths, or no teacher."""
        found = check_layers(self.map, student, need_teacher(WHAT, teacher), WHAT, ("one", "mean"), self.layer_weights)
        self._refuse_embedding(found)

    @staticmethod
    def _refuse_embedding(found: layer_maps.LayerMap | None) -> None:
        if found is not None and any(0 in row for row in found.rows):
            raise ValueError(f"{WHAT}: the layer map names layer 0, the embedding output, which has no attention")

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        ours, theirs = student.attentions, teacher.attentions
        if not ours or not theirs:
            raise ValueError(
                f"{WHAT}: {len(ours)} student layers, {len(theirs)} teacher layers in the outputs; scores need "
                f'model.set_attn_implementation("{LOWBIT_ATTENTION}")'
            )
        found = resolved(self.map, len(ours), len(theirs), WHAT, ("one", "mean"), self.layer_weights)
        self._refuse_embedding(found)
        mask, distance = batch.get("attention_mask"), {"mse": self._squared, "cross_entropy": self._cross_entropy}
        loss: Any = 0.0
        for layer, row in found.taught():
            if weight := weight_of(self.layer_weights, layer):
                s, t = full(ours[layer - 1]), average([full(theirs[each - 1]) for each in row])
                if s.shape[1] != t.shape[1]:
                    s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
                keys = None if mask is None else mask.reshape(-1, 1, 1, mask.shape[-1]).bool()
                loss = loss + weight * distance[self.distance](s, t, keys)
        return self.weight * (loss if torch.is_tensor(loss) else full(ours[0]).sum() * 0)

    def _squared(self, s: torch.Tensor, t: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """Of scores [B, H, S, S], with keys [B, 1, 1, S] True where they are real."""
        if keys is None:
            return (s - t).square().mean()
        counted = keys if self.include_padding else keys & keys.transpose(2, 3)
        difference = (s - t).masked_fill(~counted, 0.0).square()
        if self.include_padding:
            return difference.mean()
        return difference.sum() / (counted.sum() * s.shape[1]).clamp(min=1)

    def _cross_entropy(self, s: torch.Tensor, t: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        if keys is not None:
            lowest = torch.finfo(s.dtype).min  # -inf times its share, 0, is NaN
            s, t = s.masked_fill(~keys, lowest), t.masked_fill(~keys, lowest)
        rows = -(F.softmax(t, -1) * F.log_softmax(s, -1)).sum(-1)
        if keys is None or self.include_padding:
            return rows.mean()
        queries = keys.squeeze(2).expand_as(rows)
        return rows.masked_fill(~queries, 0.0).sum() / queries.sum().clamp(min=1)
