"""Distance of hidden states: sum over layers of MSE(student hidden, teacher hidden)      (TernaryBERT eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import models
from .base import Batch, mean, need_teacher, sizes_of
from .layers import check_layers, paired


@dataclass
class HiddenStateLoss:
    """MSE of the embedding output and of every layer, summed over layers; padded tokens do not count.

    Args:
        weight: factor of the loss.
        include_padding: average over padded tokens too (the published mode).
        map: which teacher layer teaches which student layer (`lowbit.distill.layer_maps`).
    """

    weight: float = 1.0
    include_padding: bool = False
    map: Any = "uniform"
    name: str = "hidden"
    needs: tuple[str, ...] = ("hidden_states",)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for another hidden size, layers that do not divide the teacher's, or no teacher."""
        teacher = need_teacher("HiddenStateLoss", teacher)
        widths = sizes_of("hidden_size", student, teacher)
        if widths and widths[0] != widths[1]:
            scores = all(map(models.has_plain_attention, (student, teacher)))
            raise ValueError(
                f"HiddenStateLoss: student hidden size {widths[0]}, teacher {widths[1]}; they must be equal. Pass "
                f"objectives=[{'AttentionScoreLoss(), ' if scores else ''}LogitsLoss()], or stages without "
                f"HiddenStateLoss, or take a student of hidden size {widths[1]}"
            )
        check_layers(self.map, student, teacher, "HiddenStateLoss")

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        s_embedding, *s_layers = student.hidden_states
        t_embedding, *t_layers = teacher.hidden_states
        if s_embedding.shape[-1] != t_embedding.shape[-1]:
            raise ValueError(
                f"HiddenStateLoss: student hidden size {s_embedding.shape[-1]}, teacher {t_embedding.shape[-1]}; "
                "they must be equal"
            )
        mask = None if self.include_padding else batch.get("attention_mask")
        pairs = [(s_embedding, t_embedding), *paired(self.map, s_layers, t_layers, "HiddenStateLoss")]
        loss: Any = sum(mean((s - t).float().square().mean(-1), mask) for s, t in pairs)
        return self.weight * loss
