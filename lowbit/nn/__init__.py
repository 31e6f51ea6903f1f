"""Drop-in modules: quantized for training (`Quant*`), packed for running (`Packed*`)."""

from .decoder import PackedDecoder, QuantDecoder
from .embedding import PackedEmbedding, QuantEmbedding
from .encoder import UnpaddedEncoder
from .fused_embeddings import FusedEmbeddings
from .linear import PackedLinear, QuantLinear
from .packed_encoder import PackedEncoder

__all__ = [
    "FusedEmbeddings",
    "PackedDecoder",
    "PackedEmbedding",
    "PackedEncoder",
    "PackedLinear",
    "QuantDecoder",
    "QuantEmbedding",
    "QuantLinear",
    "UnpaddedEncoder",
]
