"""Configurations of the models of this room.

`lowbit._register` imports them right after `AutoConfig`, which happens in the midst of other imports of transformers:
nothing but its base class is taken from there.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class _OfThisRoom:
    """Reading such a configuration registers its models with the Auto classes, which are asked next.

    Not before: transformers' models import the Auto classes, and ours import transformers' models. By its name, since
    the models import their configuration.
    """

    models: str
    reads_pairs: bool  # token types say where the second text begins, and are needed

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        importlib.import_module(f"{__package__}.{cls.models}")
        return super().from_dict(*args, **kwargs)  # type: ignore[misc]


class DeformerConfig(_OfThisRoom, PreTrainedConfig):
    """BERT's fields, and how question and passage are read apart.

    Attributes:
        separate_layers: how many of the first layers read them apart.
        passage_offset: position of a passage's first token: 0 as published, or the longest question's length.
    """

    model_type = "deformer"
    models = "deformer"
    reads_pairs = True

    separate_layers: int = 9
    passage_offset: int = 0
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | int | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


class WordClassifierConfig(_OfThisRoom, PreTrainedConfig):
    """Of a classifier over words.

    Attributes:
        encoder: "bilstm" (last states of both directions) or "cnn" (maxima of convolutions over time).
        vocab_size: words, with padding (0) and unknown (1).
        embedding_size: width of the word vectors.
        hidden_size: of each direction of the BiLSTM; feature maps of each kernel of the CNN.
        num_hidden_layers: of the BiLSTM.
        kernel_sizes: words that the kernels of the CNN see.
        intermediate_size: of the linear before the labels.
        dropout: of what the encoder gives, and before the labels.
        pair: classify pairs [a; b; |a-b|; a*b]; the second text has token type 1.
    """

    model_type = "word-classifier"
    models = "words"

    @property
    def reads_pairs(self) -> bool:  # type: ignore[override]
        return self.pair

    encoder: str = "bilstm"
    vocab_size: int = 10000
    embedding_size: int = 300
    hidden_size: int = 150
    num_hidden_layers: int = 1
    kernel_sizes: list[int] | tuple[int, ...] = (3, 4, 5)
    intermediate_size: int = 200
    dropout: float = 0.1
    pair: bool = False
    pad_token_id: int | None = 0
    initializer_range: float = 0.1


def register() -> None:
    """Tell `AutoConfig`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind in (DeformerConfig, WordClassifierConfig):
        CONFIG_MAPPING.register(kind.model_type, kind, exist_ok=True)
