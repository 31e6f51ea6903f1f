"""Kernels for 2- and 1-bit BERT: packing, quantization, linears, LayerNorm and embeddings as `torch.library` ops.

CPU tensors take C++ kernels for AMX or AVX-512 VNNI, compiled when first used (`native.py`), or torch's int8 products
where these cannot run; CUDA tensors a Triton kernel, meta tensors a shape function. `reference.py` defines every op in
float64. Names are resolved on first use: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_cpu import AttentionOutput, attention_eager
    from .embedding import quantized_embedding
    from .fused_embedding import embedding_layernorm
    from .layernorm import add_layernorm
    from .linear import binary_linear, codes_linear, joint_dynamic_linear, joint_linear, split_linear, ternary_linear
    from .linear_cpu import expanded_bytes, keep_expanded
    from .packing import (
        pack_binary,
        pack_split,
        pack_ternary,
        pack_trits,
        unpack_binary,
        unpack_split,
        unpack_ternary,
        unpack_trits,
    )
    from .prune import gather_tokens, kept_cu_seqlens, select_tokens
    from .quantize import fake_quantize_per_token, quantize_per_tensor, quantize_per_token
    from .varlen_attention import attention
    from .weights import binarize, split_ternary, ternarize

__version__ = "0.1.0"

_HOME = {
    "AttentionOutput": "attention_cpu",
    "add_layernorm": "layernorm",
    "attention": "varlen_attention",
    "attention_eager": "attention_cpu",
    "binarize": "weights",
    "binary_linear": "linear",
    "codes_linear": "linear",
    "embedding_layernorm": "fused_embedding",
    "expanded_bytes": "linear_cpu",
    "fake_quantize_per_token": "quantize",
    "gather_tokens": "prune",
    "joint_dynamic_linear": "linear",
    "joint_linear": "linear",
    "keep_expanded": "linear_cpu",
    "kept_cu_seqlens": "prune",
    "pack_binary": "packing",
    "pack_split": "packing",
    "pack_ternary": "packing",
    "pack_trits": "packing",
    "quantize_per_tensor": "quantize",
    "quantize_per_token": "quantize",
    "quantized_embedding": "embedding",
    "select_tokens": "prune",
    "split_linear": "linear",
    "split_ternary": "weights",
    "ternarize": "weights",
    "ternary_linear": "linear",
    "unpack_binary": "packing",
    "unpack_split": "packing",
    "unpack_ternary": "packing",
    "unpack_trits": "packing",
}

__all__ = [
    "AttentionOutput",
    "add_layernorm",
    "attention",
    "attention_eager",
    "binarize",
    "binary_linear",
    "codes_linear",
    "embedding_layernorm",
    "expanded_bytes",
    "fake_quantize_per_token",
    "gather_tokens",
    "joint_dynamic_linear",
    "joint_linear",
    "keep_expanded",
    "kept_cu_seqlens",
    "pack_binary",
    "pack_split",
    "pack_ternary",
    "pack_trits",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantized_embedding",
    "select_tokens",
    "split_linear",
    "split_ternary",
    "ternarize",
    "ternary_linear",
    "unpack_binary",
    "unpack_split",
    "unpack_ternary",
    "unpack_trits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
