"""Relations between the words of a layer, or between the layers of a word (contextual KD, Park et al. 2021).

pair     c_ij = cos(x_i, x_j); rows softmax over j other than i; KL(teacher's row || student's row)
triple   psi_ijk = u_ij . u_ik, u_ij = (x_i - x_j) / |x_i - x_j|, the cosine of the angle at i; MSE

Cosines and angles have no width, so that models of any two widths are compared, and no scale. A relation is computed
for groups x [R, n, d] of n vectors, of which `real` [R, n] counts: the words of each sentence, one layer after the
other; or the compared layers of each word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .. import layer_maps
from .base import Batch, full, need_one_of, need_teacher, token_mask
from .distances import unit
from .layers import check_layers, resolved

Group = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the student's x, the teacher's, real
Sums = tuple[torch.Tensor, torch.Tensor]  # of a loss, and of what it is a mean over


@dataclass
class _ContextLoss(ABC):
    """What both relations share: fields, checks, and the groups."""

    weight: float = 1.0
    axis: str = "words"
    map: Any = "uniform"
    embedding: bool = True
    needs: tuple[str, ...] = ("hidden_states",)

    def __post_init__(self) -> None:
        need_one_of(f"{type(self).__name__}: axis", self.axis, ("words", "layers"))
        self.map = layer_maps.opened(self.map)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for a map for other depths or of too few layers, or no teacher."""
        what = type(self).__name__
        found = check_layers(self.map, student, need_teacher(what, teacher), what)
        if found is not None:
            self._rows(found)

    def _rows(self, found: layer_maps.LayerMap) -> list[tuple[int, int]]:
        """(student's, teacher's) of all layers that are compared; 0 is the embedding output."""
        rows = [*([(0, 0)] if self.embedding else []), *((layer, row[0]) for layer, row in found.taught())]
        if len(rows) < (2 if self.axis == "layers" else 1):
            what = type(self).__name__
            raise ValueError(f"{what}: axis={self.axis!r} and {len(rows)} layers to compare; pass a map of more layers")
        return rows

    def _groups(self, student: Any, teacher: Any, batch: Batch) -> Iterator[Group]:
        ours, theirs = student.hidden_states, teacher.hidden_states
        rows = self._rows(resolved(self.map, len(ours) - 1, len(theirs) - 1, type(self).__name__))
        real = token_mask(batch, ours[0])
        if self.axis == "words":
            yield from ((full(ours[s]), full(theirs[t]), real) for s, t in rows)
        else:  # [B, S, layers, d] -> [B S, layers, d]
            layers = (
                torch.stack([full(states[row[which]]) for row in rows], 2).flatten(0, 1)
                for which, states in enumerate((ours, theirs))
            )
            yield (*layers, real.reshape(-1, 1).expand(-1, len(rows)))  # type: ignore[misc]

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        # One layer after the other: what is in between has many times a layer's states.
        sums = [self._sums(*group) for group in self._groups(student, teacher, batch)]
        total, count = (torch.stack(each).sum() for each in zip(*sums, strict=True))
        return self.weight * total / count.clamp(min=1)

    @abstractmethod
    def _sums(self, s: torch.Tensor, t: torch.Tensor, real: torch.Tensor) -> Sums:
        """A sum over a group of vectors [B, n, d], and what it is to be divided by."""


@dataclass
class PairRelationLoss(_ContextLoss):
    """KL divergence of each vector's cosines with the others.

    Args:
        weight: factor of the loss.
        axis: "words": relations between the real tokens of a sentence, in each layer; "layers": between the layers of
            each real token.
        map: which teacher layer stands for which student layer: a name, list, file or `LayerMap` of
            `lowbit.distill.layer_maps`.
        embedding: take the embedding outputs for a layer too.
        reduction: "rows": mean over vectors that have another to be compared with; "pairs": the sum divided by the
            number of pairs (i, j) of real ones, i = j included (the published mode, which weighs long texts less).
    """

    reduction: str = "rows"
    name: str = "pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_one_of("PairRelationLoss: reduction", self.reduction, ("rows", "pairs"))

    def _sums(self, s: torch.Tensor, t: torch.Tensor, real: torch.Tensor) -> Sums:
        pairs = real.unsqueeze(1) & real.unsqueeze(2)
        others = pairs & ~torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        s, t = (_log_shares(x, others) for x in (s, t))
        total = (t.exp() * (t - s)).masked_fill(~others, 0.0).sum()
        return total, (pairs if self.reduction == "pairs" else others.any(-1)).sum()


def _log_shares(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """log softmax over j of cos(x_i, x_j), [R, n, n], of the pairs in `others`; finite elsewhere.

    A row that has no other vector is uniform over what does not count.
    """
    directions = unit(x)
    cosines = directions @ directions.transpose(1, 2)
    return F.log_softmax(cosines.masked_fill(~others, torch.finfo(x.dtype).min), -1)


@dataclass
class TripleRelationLoss(_ContextLoss):
    """MSE of the angles at each vector between pairs of its neighbours.

    It takes R n window (window + d) floats for each layer and model, and a window of 5 to 11 will do on a CPU.

    Args:
        weight: factor of the loss.
        axis: "words": angles between the real tokens of a sentence, in each layer; "layers": between the layers of each
            real token.
        window: i and this many vectors around it less one: an odd number from 3.
        map: which teacher layer stands for which student layer: a name, list, file or `LayerMap` of
            `lowbit.distill.layer_maps`.
        embedding: take the embedding outputs for a layer too.
        include_padding: the published mode: neighbours of a real i may be padding, those beyond an end are the end
            itself, and the mean is over all window^2 pairs. Else it is over real neighbours j and k, other than i and
            than each other.
    """

    window: int = 21
    include_padding: bool = False
    name: str = "triples"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"TripleRelationLoss: window={self.window}; accepted: odd numbers from 3")

    def _sums(self, s: torch.Tensor, t: torch.Tensor, real: torch.Tensor) -> Sums:
        count = real.shape[1]
        reach = self.window // 2 if self.include_padding else min(self.window // 2, count - 1)
        places = torch.arange(count, device=real.device)
        neighbours = places.unsqueeze(1) + torch.arange(-reach, reach + 1, device=real.device)  # [n, window]
        inside = (neighbours >= 0) & (neighbours < count) & (neighbours != places.unsqueeze(1))
        neighbours = neighbours.clamp(0, count - 1)
        if self.include_padding:
            counted = real[:, :, None, None].expand(-1, -1, self.window, self.window)
        else:
            near = real.unsqueeze(2) & inside & real[:, neighbours]  # [R, n, window]
            apart = ~torch.eye(near.shape[-1], dtype=torch.bool, device=real.device)
            counted = near.unsqueeze(2) & near.unsqueeze(3) & apart
        difference = _angles(s, neighbours) - _angles(t, neighbours)
        return difference.masked_fill(~counted, 0.0).square().sum(), counted.sum()


def _angles(x: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
    """[R, n, d] -> cosines [R, n, window, window] at each vector between its neighbours [n, window].

    A neighbour that is equal has no direction: its cosines are 0, without gradient.
    """
    directions = unit(x.unsqueeze(2) - x[:, neighbours])
    return directions @ directions.transpose(2, 3)
