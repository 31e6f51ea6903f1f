"""Distance of hidden states, summed over layers.

mse          mean over the width of (h_s W - h_t)^2                       (TernaryBERT eq. 7, TinyBERT; W: `project`)
normalised   the same of h_s / |h_s| and h_t / |h_t|                      (BERT-PKD, of the first token)
layer_norm   the same of LayerNorm(h_s) and LayerNorm(h_t), without gain  (MobileBERT, feature map transfer)
cosine       1 - cos(h_s, h_t)                                            (DistilBERT, last layer)

h_t is one teacher layer, or several: averaged or concatenated (CKD), or mixed by attention (ALP-KD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ... import models
from .. import layer_maps
from . import projections
from .base import Batch, Parametrised, full, mean, need_one_of, need_teacher, sizes_of
from .distances import DISTANCES
from .layers import attend, average, check_layers, resolved, weight_of

WHAT = "HiddenStateLoss"


@dataclass(eq=False)
class HiddenStateLoss(Parametrised):
    """Distance of the embedding output and of every layer, summed over layers; padded tokens do not count.

    Args:
        weight: factor of the loss.
        include_padding: average over padded tokens too (the published mode of TernaryBERT, TinyBERT, MobileBERT).
        map: which teacher layers teach which student layer, and how several are combined: a name, list, file or
            `LayerMap` of `lowbit.distill.layer_maps`.
        embedding: compare the embedding outputs too.
        tokens: "all", or "first" ([CLS] alone, as BERT-PKD and ALP-KD do).
        distance: "mse", "normalised", "layer_norm" or "cosine", see the top of this file.
        reduction: of the squares along the width: "mean", or "sum" (BERT-PKD's paper; its code has the mean).
        project: a learned linear, None, "shared" (one for embedding output and layers: TinyBERT's code) or "per_layer".
            Needed where widths differ, and for concatenated layers.
        project_side: what is projected: "student" to the target's width; or "teacher", the combined target to the
            student's width (CKD's paper): then the target moves, and the loss can be made small by a constant student.
        bias: of the projections.
        scale_attention: with a map that attends: divide dot products by the root of the width. Unscaled, softmax of
            768-wide states picks one layer.
        detach_weights: with a map that attends: let the student lower the loss by its states alone, and not by the
            choice of easy layers.
        layer_weights: a factor for each student layer; 0 leaves a layer out (MobileBERT's gates).
        learning_rate: of the projections; None: the trainer's.

    With a map that attends, `entropies` holds for each student layer the mean entropy of the weights in the last batch.
    """

    weight: float = 1.0
    include_padding: bool = False
    map: Any = "uniform"
    embedding: bool = True
    tokens: str = "all"
    distance: str = "mse"
    reduction: str = "mean"
    project: str | None = None
    project_side: str = "student"
    bias: bool = False
    scale_attention: bool = True
    detach_weights: bool = False
    layer_weights: Sequence[float] | None = None
    learning_rate: float | None = None
    name: str = "hidden"
    needs: tuple[str, ...] = ("hidden_states",)

    def __post_init__(self) -> None:
        need_one_of(f"{WHAT}: tokens", self.tokens, ("all", "first"))
        need_one_of(f"{WHAT}: distance", self.distance, DISTANCES)
        need_one_of(f"{WHAT}: reduction", self.reduction, ("mean", "sum"))
        need_one_of(f"{WHAT}: project", self.project, (None, "shared", "per_layer"))
        need_one_of(f"{WHAT}: project_side", self.project_side, ("student", "teacher"))
        self.map = layer_maps.opened(self.map)
        self.projections = nn.ModuleDict()
        self.entropies: dict[int, torch.Tensor] = {}

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for widths that need a projection, a map for other depths, or no teacher."""
        teacher = need_teacher(WHAT, teacher)
        widths = sizes_of("hidden_size", student, teacher)
        if widths and widths[0] != widths[1] and self.project is None:
            scores = all(map(models.has_plain_attention, (student, teacher)))
            raise ValueError(
                f"{WHAT}: student hidden size {widths[0]}, teacher {widths[1]}; they must be equal. Pass "
                f"objectives=[{'AttentionScoreLoss(), ' if scores else ''}LogitsLoss()], or stages without {WHAT}, or "
                f'{WHAT}(project="per_layer"), which learns to project, or take a student of hidden size {widths[1]}'
            )
        found = check_layers(self.map, student, teacher, WHAT, layer_maps.COMBINE, self.layer_weights)
        if found is not None and self.project is None and found.combine == "concat" and self._several(found):
            raise ValueError(f'{WHAT}: concatenated layers are wider than the student; pass project="per_layer"')
        if self.project is not None:
            self._sizes(student, teacher)

    @staticmethod
    def _several(found: layer_maps.LayerMap) -> bool:
        return any(len(row) > 1 for row in found.rows)

    def build(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Make new projections on the student's device, if there are to be any."""
        sizes = {} if self.project is None else self._sizes(student, teacher)
        self.projections = projections.make(sizes, self.bias, next(student.parameters()).device)

    def _sizes(self, student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each projection by name."""
        widths = sizes_of("hidden_size", student, teacher)
        found = check_layers(self.map, student, teacher, WHAT, layer_maps.COMBINE, self.layer_weights)
        if widths is None or found is None:
            raise ValueError(f"{WHAT}: project={self.project!r} needs configurations with hidden_size and layers")
        sizes: dict[str, tuple[int, int]] = {}
        for layer, row in self._rows(found):
            target = widths[1] * (len(row) if found.combine == "concat" else 1)
            size = (widths[0], target) if self.project_side == "student" else (target, widths[0])
            if sizes.setdefault(self._projection(layer), size) != size:
                raise ValueError(
                    f'{WHAT}: project="shared" is one projection, and layers of {size} and '
                    f'{sizes[self._projection(layer)]} inputs and outputs are compared; pass project="per_layer"'
                    + (", or embedding=False" if self.embedding else "")
                )
        return sizes

    def _projection(self, layer: int) -> str:
        return "shared" if self.project == "shared" else str(layer)

    def _rows(self, found: layer_maps.LayerMap) -> list[tuple[int, tuple[int, ...]]]:
        """(student layer, teacher layers) of all that is compared; 0 is the embedding output."""
        return [*([(0, (0,))] if self.embedding else []), *found.taught()]

    def forward(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        ours, theirs = student.hidden_states, teacher.hidden_states
        found = resolved(self.map, len(ours) - 1, len(theirs) - 1, WHAT, layer_maps.COMBINE, self.layer_weights)
        mask = None if self.include_padding else batch.get("attention_mask")
        if self.tokens == "first":
            ours, theirs, mask = [h[:, :1] for h in ours], [h[:, :1] for h in theirs], None
        loss: Any = 0.0
        for layer, row in self._rows(found):
            if weight := weight_of(self.layer_weights, layer):
                states = full(ours[layer]), [full(theirs[each]) for each in row]
                loss = loss + weight * self._of_layer(layer, *states, found.combine, mask)
        return self.weight * (loss if torch.is_tensor(loss) else full(ours[0]).sum() * 0)

    def _of_layer(
        self, layer: int, state: torch.Tensor, states: list[torch.Tensor], combine: str, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of one layer: a student's state [B, S, d] and the states [B, S, D] of its teacher layers."""
        if combine == "concat":
            states = [torch.cat(states, -1)]
        if self.project is not None:
            name = self._projection(layer)
            if self.project_side == "student":
                state = projections.apply(self.projections, name, state, WHAT)
            else:
                states = [projections.apply(self.projections, name, each, WHAT) for each in states]
        if state.shape[-1] != states[0].shape[-1]:
            raise ValueError(
                f"{WHAT}: student hidden size {state.shape[-1]}, teacher {states[0].shape[-1]}; they must be equal"
            )
        if combine == "attend" and layer:
            target, entropy = attend(state, states, self.scale_attention, self.detach_weights)
            self.entropies[layer] = mean(entropy, mask)
        else:
            target = average(states)
        values = DISTANCES[self.distance](state, target)
        return mean(values.mean(-1) if self.reduction == "mean" else values.sum(-1), mask)
