"""Drop-in modules: quantized for training (`Quant*`), packed for running (`Packed*`)."""

from .decoder import PackedDecoder, QuantDecoder
from .embedding import PackedEmbedding, QuantEmbedding
from .linear import PackedLinear, QuantLinear
from .unpadded.encoder import UnpaddedEncoder
from .unpadded.fused_embeddings import FusedEmbeddings
from .unpadded.packed_encoder import PackedEncoder

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
