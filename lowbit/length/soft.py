"""Lengths that are learned: while it trains, a layer multiplies each token by a factor instead of dropping some.

    learned token pruning   M = sigmoid((share - theta_l) / temperature), after the FFN
                            penalty: weight * sum_l mean over tokens of M               theta_l is learned
    PoWER-BERT              M = W_l[rank of the token by importance], after attention
                            penalty: sum_l weight * l * |W_l|_1, l = 1 .. L             W_l in [0, 1] is learned

`lowbit.SoftLengthTrainer` trains a model with one of them; its `length_config()` is what the model then keeps for good.
The first token of a sequence is never dropped, so its factor is 1 in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..config import LengthConfig
from ..nn.unpadded.sequences import Sequences


class SoftLengths(nn.Module, ABC):
    """What both have in common; a `lowbit.nn.unpadded.encoder.SoftMask`.

    While a model trains this is a module of its encoder, so that devices, gradients and other ranks take care of its
    parameters; but they are none of the model's and not in its state dict.

    Attributes:
        learning_rate: of the parameters, decayed as the model's.
    """

    place: str

    def __init__(self, layers: int, weight: float, learning_rate: float) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"{name}: layers={layers!r}; accepted: the model's number of layers")
        for option, value in (("weight", weight), ("learning_rate", learning_rate)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {option}={value}; accepted: 0 or above")
        self.layers, self.weight, self.learning_rate = layers, weight, learning_rate

    @abstractmethod
    def penalty(self) -> torch.Tensor:
        """What the loss gets for tokens kept in the last forward pass: a scalar, differentiable."""

    def clip_(self) -> None:
        """Bring the parameters back to where they may be; called after every optimizer step."""

    @abstractmethod
    def length_config(self) -> LengthConfig:
        """What has been learned, for `lowbit.set_length`."""

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class LearnedThresholds(SoftLengths):
    """Learned token pruning (Kim et al. 2022), the soft phase.

    The share of a token is the attention that it receives, beside that of an even distribution over its sequence; the
    mean over a sequence is 1, whatever its length. The released code divides by the padded length S: its thresholds and
    temperatures times S are ours. Another deliberate difference: the first token's factor is 1, as it is never dropped.

    Args:
        layers: of the model.
        final_threshold: layer l = 0 .. L-1 starts at final_threshold * l / L.
            Published 0.01 S.
        temperature: of the sigmoid; published 1e-5 S to 2e-3 S.
        weight: of the penalty; published 0.01 to 0.2.
        learning_rate: of the thresholds.
    """

    place = "ffn"

    def __init__(
        self,
        layers: int,
        *,
        final_threshold: float = 1.0,
        temperature: float = 0.1,
        weight: float = 0.1,
        learning_rate: float = 1e-2,
    ) -> None:
        super().__init__(layers, weight, learning_rate)
        if not 0 <= final_threshold < float("inf"):
            raise ValueError(f"LearnedThresholds: final_threshold={final_threshold}; accepted: 0 or above")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"LearnedThresholds: temperature={temperature}; accepted: above 0")
        self.final_threshold, self.temperature = final_threshold, temperature
        self.offset = nn.Parameter(torch.zeros(layers))
        self._kept: dict[int, torch.Tensor] = {}

    def thresholds(self) -> torch.Tensor:
        """float [L]."""
        start = torch.arange(self.layers, device=self.offset.device) / self.layers
        return self.final_threshold * start + self.offset

    def forward(self, layer: int, importance: torch.Tensor, sequences: Sequences, heads: int) -> torch.Tensor:
        factor = torch.sigmoid((importance / heads - self.thresholds()[layer]) / self.temperature)
        factor = factor.masked_fill(_first(sequences.cu_seqlens, len(importance)), 1.0)
        self._kept[layer] = factor.mean()
        return factor

    def penalty(self) -> torch.Tensor:
        total: Any = sum(self._kept.values())
        self._kept = {}
        return self.weight * total

    def length_config(self) -> LengthConfig:
        """The thresholds, for the hard phase: training and use with tokens dropped."""
        keep = self.thresholds().detach().double().clamp(min=0)
        return LengthConfig(tuple(keep.tolist()), unit="threshold")


class SoftExtract(SoftLengths):
    """PoWER-BERT's search for a configuration (Goyal et al. 2020).

    A token's rank among those of its own sequence is found anew in every forward pass, with no gradient through the
    sort; the first token has rank 0, whose factor is 1. Published for one padded length: here ranks are absolute, so a
    sentence of n tokens uses W[:n], and `max_length` is the longest that the model may get. Importance counts a token's
    attention to itself, which the released code takes off.

    Args:
        layers: of the model.
        max_length: of a sequence, in tokens.
        weight: lambda of the penalty; published 1e-4 to 7e-3.
        learning_rate: of W; published 1e-4 to 3e-3.
    """

    place = "attention"

    def __init__(self, layers: int, max_length: int, *, weight: float = 1e-3, learning_rate: float = 3e-3) -> None:
        super().__init__(layers, weight, learning_rate)
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"SoftExtract: max_length={max_length!r}; accepted: a whole number from 1")
        self.max_length = max_length
        self.rank_weight = nn.Parameter(torch.ones(layers, max_length - 1))  # of ranks 1, 2, ...

    def retention(self) -> torch.Tensor:
        """W: float [L, max_length], the factor of each rank."""
        return F.pad(self.rank_weight, (1, 0), value=1.0)

    def forward(self, layer: int, importance: torch.Tensor, sequences: Sequences, heads: int) -> torch.Tensor:
        if sequences.max_seqlen > self.max_length:
            raise ValueError(
                f"SoftExtract(max_length={self.max_length}) got a sequence of {sequences.max_seqlen} tokens; "
                "accepted: up to max_length"
            )
        return self.retention()[layer][ranks(importance.detach(), sequences.cu_seqlens)].to(importance.dtype)

    def penalty(self) -> torch.Tensor:
        depth = torch.arange(1, self.layers + 1, device=self.rank_weight.device)
        return self.weight * (depth * self.retention().abs().sum(1)).sum()

    def clip_(self) -> None:
        with torch.no_grad():
            self.rank_weight.clamp_(0, 1)

    def length_config(self) -> LengthConfig:
        """Layer l keeps the whole part of sum(W_l), and no more than the layer before it."""
        sums = self.retention().detach().double().sum(1)
        keep = sums.clamp(min=1).floor().cummin(0).values
        return LengthConfig(tuple(int(k) for k in keep.tolist()), unit="tokens")


def ranks(importance: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Place of every token in the order of importance of its sequence: int64 [T], the first token's is 0.

    Ties go to the earlier token; NaN comes last.
    """
    tokens = len(importance)
    lengths = cu_seqlens.diff().long()
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=tokens)
    score = importance.masked_fill(importance.isnan(), float("-inf"))
    score = score.masked_fill(_first(cu_seqlens, tokens), float("inf"))
    order = score.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]
    place = torch.arange(tokens, device=order.device) - cu_seqlens[:-1].long()[sequence]
    return torch.empty_like(order).scatter_(0, order, place)


def _first(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """bool [T]: the first token of each sequence (an empty one has none)."""
    first = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    return first.index_fill_(0, cu_seqlens.long(), True)[:-1]
