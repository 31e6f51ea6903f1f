"""Classifiers over words that are no transformers: a BiLSTM (Tang et al. 2019, 1903.12136) and a CNN (Kim 2014).

    one text    dense(encode(a))
    a pair      dense([a; b; |a - b|; a * b]),  a and b encoded by the same weights, b the tokens of type 1

Padding changes nothing: the BiLSTM reads packed sequences, the CNN's maximum is over windows of real words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configurations import WordClassifierConfig
from .segments import take


class _BiLSTM(nn.Module):
    """Vectors [B, S, E], lengths [B] -> last states of both directions [B, 2 H]."""

    def __init__(self, config: WordClassifierConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
        )
        self.width = 2 * config.hidden_size

    def forward(self, vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(vectors, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (states, _) = self.lstm(packed)
        return torch.cat((states[-2], states[-1]), -1)


class _CNN(nn.Module):
    """Vectors [B, S, E], lengths [B] -> maxima over time of each kernel's feature maps [B, kernels x H].

    A window holds real words only; a text that is shorter than it has one window, filled up with zeros.
    """

    def __init__(self, config: WordClassifierConfig) -> None:
        super().__init__()
        sizes = config.kernel_sizes
        self.kernels = nn.ModuleList([nn.Conv1d(config.embedding_size, config.hidden_size, size) for size in sizes])
        self.width = len(sizes) * config.hidden_size

    def forward(self, vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        maxima = []
        for kernel in self.kernels:
            size: int = kernel.kernel_size[0]  # type: ignore[index, assignment]
            maps = F.relu(kernel(F.pad(vectors.transpose(1, 2), (0, size - 1))))
            windows = (lengths - size + 1).clamp(min=1)
            outside = torch.arange(maps.shape[-1], device=maps.device) >= windows[:, None]
            maxima.append(maps.masked_fill(outside[:, None], 0).amax(-1))  # relu: nothing is below 0
        return torch.cat(maxima, -1)


_ENCODERS = {"bilstm": _BiLSTM, "cnn": _CNN}


class WordModel(PreTrainedModel):
    """Ids of words -> one vector for each text, or pair of texts."""

    config_class = WordClassifierConfig
    base_model_prefix = "words"
    config: Any

    def __init__(self, config: WordClassifierConfig) -> None:
        super().__init__(config)
        if config.encoder not in _ENCODERS:
            raise ValueError(f"encoder={config.encoder!r}; accepted: {', '.join(_ENCODERS)}")
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        encoder: Any = _ENCODERS[config.encoder](config)
        self.encoder = encoder
        self.dense = nn.Linear(encoder.width * (4 if config.pair else 1), config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """ids [B, S] -> `pooler_output` [B, intermediate_size].

        Raises:
            ValueError: a model of pairs, and no token types.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        vectors = self.dropout(self.embeddings(input_ids))
        if not self.config.pair:
            text = self._encode(vectors, real)
        elif token_type_ids is None:
            raise ValueError("this model classifies pairs: it needs token_type_ids, 1 in the second text")
        else:
            a, b = (self._encode(vectors, real & (token_type_ids == kind)) for kind in (0, 1))
            text = torch.cat((a, b, (a - b).abs(), a * b), -1)
        return BaseModelOutputWithPooling(pooler_output=F.relu(self.dense(self.dropout(text))))

    def _encode(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        text = take(vectors, chosen)
        return self.encoder(text.states, text.mask.sum(1))


class WordClassifier(PreTrainedModel):
    """`WordModel` and a linear; loss as of transformers' classifiers."""

    config_class = WordClassifierConfig
    base_model_prefix = "words"
    config: Any

    def __init__(self, config: WordClassifierConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.words = WordModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.intermediate_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """ids [B, S] -> logits [B, labels]; labels int [B], or float for regression."""
        text = self.words(input_ids, attention_mask, token_type_ids, return_dict=True).pooler_output
        logits = self.classifier(self.dropout(text))
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoModel.register(WordClassifierConfig, WordModel, exist_ok=True)
AutoModelForSequenceClassification.register(WordClassifierConfig, WordClassifier, exist_ok=True)
