"""Drop-in modules: quantized for training (`Quant*`), packed for running (`Packed*`)."""

from .embedding import PackedEmbedding, QuantEmbedding
from .encoder import PackedEncoder
from .linear import PackedLinear, QuantLinear

__all__ = ["PackedEmbedding", "PackedEncoder", "PackedLinear", "QuantEmbedding", "QuantLinear"]
