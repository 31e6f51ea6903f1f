"""Drop-in modules: quantized for training (`Quant*`), packed for running (`Packed*`)."""

from .embedding import PackedEmbedding, QuantEmbedding
from .linear import PackedLinear, QuantLinear

__all__ = ["PackedEmbedding", "PackedLinear", "QuantEmbedding", "QuantLinear"]
