"""Mean and variance of each token's state along the width, summed over layers (MobileBERT, feature map transfer).

L = sum over layers of  mean_weight (mean h_s - mean h_t)^2 + variance_weight |var h_s - var h_t|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import layer_maps
from .base import Batch, full, mean, need_one_of, need_teacher
from .layers import check_layers, resolved, weight_of

WHAT = "StatisticsLoss"


@dataclass
class StatisticsLoss:
    """Distance of what LayerNorm takes out of hidden states; padded tokens do not count. Widths may differ.

    `HiddenStateLoss(distance="layer_norm")` is the rest. MobileBERT weighs the means by 5000, the variances by 5 and
    the rest by 100, and divides by the number of layers: for 24 layers mean_weight=5000/24, variance_weight=5/24.

    Args:
        weight: factor of the loss.
        mean_weight, variance_weight: factors of its two parts.
        include_padding: average over padded tokens too (the published mode).
        map: which teacher layer teaches which student layer: a name, list, file or `LayerMap` of
            `lowbit.distill.layer_maps`.
        teacher_layers: "mapped" compares with the layer that the map names; "all" compares each student layer with the
            embedding output and all layers, and takes the mean, as the published code does.
        layer_weights: a factor for each student layer; 0 leaves a layer out (MobileBERT's gates).
    """

    weight: float = 1.0
    mean_weight: float = 1.0
    variance_weight: float = 1.0
    include_padding: bool = False
    map: Any = "uniform"
    teacher_layers: str = "mapped"
    layer_weights: Sequence[float] | None = None
    name: str = "statistics"
    needs: tuple[str, ...] = ("hidden_states",)

    def __post_init__(self) -> None:
        need_one_of(f"{WHAT}: teacher_layers", self.teacher_layers, ("mapped", "all"))
        self.map = layer_maps.opened(self.map)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for a map for other depths, or no teacher."""
        check_layers(self.map, student, need_teacher(WHAT, teacher), WHAT, weights=self.layer_weights)

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        ours, theirs = student.hidden_states, teacher.hidden_states
        found = resolved(self.map, len(ours) - 1, len(theirs) - 1, WHAT, weights=self.layer_weights)
        mask = None if self.include_padding else batch.get("attention_mask")
        loss: Any = 0.0
        for layer, row in found.taught():
            if weight := weight_of(self.layer_weights, layer):
                against = range(len(theirs)) if self.teacher_layers == "all" else row
                parts = [mean(self._distance(full(ours[layer]), full(theirs[each])), mask) for each in against]
                loss = loss + weight * torch.stack(parts).mean()
        return self.weight * (loss if torch.is_tensor(loss) else full(ours[0]).sum() * 0)

    def _distance(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """[B, S, d] and [B, S, D] -> [B, S]."""
        means = (s.mean(-1) - t.mean(-1)).square()
        variances = (s.var(-1, correction=0) - t.var(-1, correction=0)).abs()
        return self.mean_weight * means + self.variance_weight * variances
