"""Drop-in modules: quantized for training (`Quant*`), packed for running (`Packed*`)."""

from .embedding import FusedEmbeddings, PackedEmbedding, QuantEmbedding
from .encoder import PackedEncoder, UnpaddedEncoder
from .linear import PackedLinear, QuantLinear

__all__ = [
    "FusedEmbeddings",
    "PackedEmbedding",
    "PackedEncoder",
    "PackedLinear",
    "QuantEmbedding",
    "QuantLinear",
    "UnpaddedEncoder",
]
