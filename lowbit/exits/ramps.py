"""Ramps: small float classifiers behind layers, each of which reads what is behind its own.

linear      dropout, linear, on the first token's state
mean        dropout, linear, on the mean of all tokens' states; first tokens know little after few layers
pooler      linear, tanh, dropout, linear, on the first token's state; the pooler begins as the model's  (DeeBERT)
shared      the model's own pooler, the same for all ramps; dropout, linear                             (PABEE)
attention   linear to 128, tanh, attention of 2 heads, then of the first token linear, tanh, linear     (FastBERT)

certainty   a linear to one number for all ramps, on what a ramp's last linear reads                    (BERxiT)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import models
from ..nn import PackedLinear
from ..nn.unpadded.sequences import Sequences
from .criteria import Criterion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTH, _HEADS = 128, 2  # of FastBERT's attention


class Answer(NamedTuple):
    """What a ramp says of B sentences."""

    logits: torch.Tensor  # [B, C]
    wrong: torch.Tensor | None  # logits [B] of the answer being wrong, where there is a certainty head


def first_states(tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """States of the first tokens: [T, H] -> [B, H], zeros of an empty sequence."""
    if sequences.cu_seqlens.shape[0] == 2:  # one sequence
        return tokens[:1]
    starts, ends = sequences.cu_seqlens[:-1], sequences.cu_seqlens[1:]
    first = tokens[starts.clamp(max=len(tokens) - 1).long()]
    return first.masked_fill((starts == ends)[:, None], 0)


def mean_states(tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Means over the tokens of each sequence: [T, H] -> [B, H], zeros of an empty one."""
    if sequences.cu_seqlens.shape[0] == 2:  # one sequence; a product is quicker than `mean` over rows
        return tokens.new_full((1, len(tokens)), 1 / max(len(tokens), 1)) @ tokens
    lengths = sequences.cu_seqlens.diff().long()
    of = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
    total = tokens.new_zeros(len(lengths), tokens.shape[1]).index_add(0, of, tokens[: len(of)])
    return total / lengths.clamp(min=1)[:, None]


class Ramp(nn.Module):
    """A classifier of one layer's output.

    Args:
        width: of the hidden states.
        num_labels: C.
        dropout: in training, of what the last linear reads.
    """

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)

    def features(self, tokens: torch.Tensor, sequences: Sequences, pooler: nn.Module | None) -> torch.Tensor:
        """What the last linear reads: [T, H] -> [B, features]."""
        return first_states(tokens, sequences)

    def forward(
        self,
        tokens: torch.Tensor,
        sequences: Sequences,
        pooler: nn.Module | None = None,
        certainty: nn.Module | None = None,
    ) -> Answer:
        features = self.features(tokens.to(self.classifier.weight.dtype), sequences, pooler)
        wrong = None if certainty is None else certainty(features).squeeze(-1)
        features = self.dropout(features) if self.training else features
        return Answer(self.classifier(features), wrong)


class PoolerRamp(Ramp):
    """With a pooler of its own."""

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__(width, num_labels, dropout)
        self.dense = nn.Linear(width, width)

    def features(self, tokens: torch.Tensor, sequences: Sequences, pooler: nn.Module | None) -> torch.Tensor:
        return torch.tanh(self.dense(first_states(tokens, sequences)))


class SharedRamp(Ramp):
    """On the model's own pooler."""

    def features(self, tokens: torch.Tensor, sequences: Sequences, pooler: nn.Module | None) -> torch.Tensor:
        assert pooler is not None
        return pooler(first_states(tokens, sequences).unsqueeze(1))  # it reads the first of [B, S, H]


class MeanRamp(Ramp):
    """On the mean of all tokens."""

    def features(self, tokens: torch.Tensor, sequences: Sequences, pooler: nn.Module | None) -> torch.Tensor:
        return mean_states(tokens, sequences)


class AttentionRamp(Ramp):
    """With a small attention over all tokens, of which only the first one asks."""

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__(_WIDTH, num_labels, dropout)
        self.down = nn.Linear(width, _WIDTH)
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, dropout=dropout, batch_first=True)
        self.dense = nn.Linear(_WIDTH, _WIDTH)

    def features(self, tokens: torch.Tensor, sequences: Sequences, pooler: nn.Module | None) -> torch.Tensor:
        small = torch.tanh(self.down(tokens))
        lengths = sequences.cu_seqlens.diff()
        parts = small[: int(sequences.cu_seqlens[-1])].split(lengths.tolist())
        rows = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        places = torch.arange(rows.shape[1], device=rows.device)
        padding = places >= lengths.clamp(min=1)[:, None]  # an empty sequence attends to one zero
        found, _ = self.attention(rows[:, :1], rows, rows, key_padding_mask=padding, need_weights=False)
        return torch.tanh(self.dense(found[:, 0]))


KINDS: dict[str, type[Ramp]] = {
    "linear": Ramp,
    "mean": MeanRamp,
    "pooler": PoolerRamp,
    "shared": SharedRamp,
    "attention": AttentionRamp,
}


class Ramps(nn.ModuleDict):
    """The ramps of a model by the number of the layer that each is behind, counted from 1; `model.exits`.

    Attributes:
        kind: of all, a key of `KINDS`.
        criterion: by which sentences leave, None: none does.
    """

    inside_encoder = True  # which calls them with all tokens, whatever the head reads

    def __init__(self, model: PreTrainedModel, kind: str, layers: list[int], certainty: bool) -> None:
        super().__init__()
        config: Any = model.config
        weight = next(p for p in model.parameters() if p.is_floating_point())
        dropout = next((v for v in map(lambda n: getattr(config, n, None), _DROPOUTS) if v is not None), 0.0)
        width = config.hidden_size
        with torch.device(weight.device):
            for layer in layers:
                self[str(layer)] = KINDS[kind](width, config.num_labels, dropout)
            if certainty:
                self["certainty"] = nn.Linear(_WIDTH if kind == "attention" else width, 1)
        self.to(weight.dtype)
        self.train(model.training)
        self.kind = kind
        self.criterion: Criterion | None = None
        if weight.device.type != "meta":
            self._initialize(model)

    @property
    def certainty_head(self) -> nn.Module | None:
        """What says how probably a ramp is wrong, of the features that its last linear reads."""
        return self._modules.get("certainty")

    @property
    def layers(self) -> list[int]:
        """Layers with a ramp behind them, ascending."""
        return [int(name) for name in self if name != "certainty"]

    @torch.no_grad()
    def _initialize(self, model: PreTrainedModel) -> None:
        """As transformers makes fresh heads; poolers as the model's own, where it has one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
                nn.init.zeros_(module.bias)
        own: Any = getattr(pooler_of(model), "dense", None)
        weight = own.dequantize() if isinstance(own, PackedLinear) else getattr(own, "weight", None)
        for ramp in self.values():
            if isinstance(ramp, PoolerRamp) and weight is not None and weight.shape == ramp.dense.weight.shape:
                ramp.dense.weight.copy_(weight)
                ramp.dense.bias.copy_(own.bias)


_DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")


def pooler_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that pools the first token's state, of models that have one."""
    path = models.describe(model).pooler
    module: Any = model.base_model
    for part in () if path is None else path.split(".")[:-1]:
        module = getattr(module, part, None)
    return None if path is None else module
