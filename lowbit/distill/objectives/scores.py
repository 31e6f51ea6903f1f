"""Distance of attention scores before softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .base import Batch, need_teacher
from .layers import check_layers, paired


@dataclass
class AttentionScoreLoss:
    """MSE of the attention scores before softmax, summed over layers; padded queries and keys do not count.

    Where the numbers of heads differ both are averaged over heads, since heads cannot be paired. For a slimmed student
    they are equal: of the teacher's scores `DistillationTrainer` takes those of the heads that `lowbit.slim` kept.

    Args:
        weight: factor of the loss.
        include_padding: set masked keys to 0 in both and average over all entries (the published mode).
        map: which teacher layer teaches which student layer (`lowbit.distill.layer_maps`).
    """

    weight: float = 1.0
    include_padding: bool = False
    map: Any = "uniform"
    name: str = "attention"
    needs: tuple[str, ...] = ("scores",)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for layers that do not divide the teacher's, or no teacher."""
        check_layers(self.map, student, need_teacher("AttentionScoreLoss", teacher), "AttentionScoreLoss")

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        mask = batch.get("attention_mask")
        loss: Any = 0.0
        for s, t in paired(self.map, student.attentions, teacher.attentions, "AttentionScoreLoss"):
            if s.shape[1] != t.shape[1]:
                s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
            difference = (s - t).float().square()
            if mask is None:
                loss = loss + difference.mean()
                continue
            keys = mask.reshape(-1, 1, 1, mask.shape[-1]).to(difference)
            if self.include_padding:
                loss = loss + (difference * keys).mean()
            else:
                pairs = (keys * keys.transpose(2, 3)).expand_as(difference)
                loss = loss + (difference * pairs).sum() / pairs.sum().clamp(min=1)
        return self.weight * loss
