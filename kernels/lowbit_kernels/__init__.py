"""Kernels for 2- and 1-bit BERT: packing, quantization, linears, LayerNorm and embeddings as `torch.library` ops.

CPU tensors take C++ kernels for AMX or AVX-512 VNNI, compiled when first used (`native.py`), or torch's int8 products
where these cannot run; CUDA tensors a Triton kernel, meta tensors a shape function. `reference.py` defines every op in
float64. Names are resolved on first use: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .archive import archive_bytes, from_archive, to_archive
    from .embedding.op import quantized_embedding
    from .fused_embedding.op import embedding_layernorm
    from .layernorm.op import add_layernorm
    from .linear.codes import codes_linear
    from .linear.cpu import expanded_bytes, keep_expanded
    from .linear.joint import joint_dynamic_linear, joint_linear
    from .linear.op import binary_linear, int8_linear, split_linear, ternary_linear, uniform_linear
    from .packing import (
        pack_binary,
        pack_split,
        pack_ternary,
        pack_trits,
        pack_uniform,
        unpack_binary,
        unpack_split,
        unpack_ternary,
        unpack_trits,
        unpack_uniform,
    )
    from .prune.op import gather_tokens, kept_cu_seqlens, select_tokens
    from .quantize.op import fake_quantize_per_token, quantize_per_tensor, quantize_per_token
    from .split.op import split_ternary
    from .varlen_attention.cpu import AttentionOutput, attention_eager
    from .varlen_attention.op import attention
    from .weights.op import binarize, ternarize

__version__ = "0.1.0"

_HOME = {
    "AttentionOutput": "varlen_attention.cpu",
    "add_layernorm": "layernorm.op",
    "archive_bytes": "archive",
    "attention": "varlen_attention.op",
    "attention_eager": "varlen_attention.cpu",
    "binarize": "weights.op",
    "binary_linear": "linear.op",
    "codes_linear": "linear.codes",
    "embedding_layernorm": "fused_embedding.op",
    "expanded_bytes": "linear.cpu",
    "fake_quantize_per_token": "quantize.op",
    "from_archive": "archive",
    "gather_tokens": "prune.op",
    "int8_linear": "linear.op",
    "joint_dynamic_linear": "linear.joint",
    "joint_linear": "linear.joint",
    "keep_expanded": "linear.cpu",
    "kept_cu_seqlens": "prune.op",
    "pack_binary": "packing",
    "pack_split": "packing",
    "pack_ternary": "packing",
    "pack_trits": "packing",
    "pack_uniform": "packing",
    "quantize_per_tensor": "quantize.op",
    "quantize_per_token": "quantize.op",
    "quantized_embedding": "embedding.op",
    "select_tokens": "prune.op",
    "split_linear": "linear.op",
    "split_ternary": "split.op",
    "ternarize": "weights.op",
    "ternary_linear": "linear.op",
    "to_archive": "archive",
    "uniform_linear": "linear.op",
    "unpack_binary": "packing",
    "unpack_split": "packing",
    "unpack_ternary": "packing",
    "unpack_trits": "packing",
    "unpack_uniform": "packing",
}

__all__ = [
    "AttentionOutput",
    "add_layernorm",
    "archive_bytes",
    "attention",
    "attention_eager",
    "binarize",
    "binary_linear",
    "codes_linear",
    "embedding_layernorm",
    "expanded_bytes",
    "fake_quantize_per_token",
    "from_archive",
    "gather_tokens",
    "int8_linear",
    "joint_dynamic_linear",
    "joint_linear",
    "keep_expanded",
    "kept_cu_seqlens",
    "pack_binary",
    "pack_split",
    "pack_ternary",
    "pack_trits",
    "pack_uniform",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantized_embedding",
    "select_tokens",
    "split_linear",
    "split_ternary",
    "ternarize",
    "ternary_linear",
    "to_archive",
    "uniform_linear",
    "unpack_binary",
    "unpack_split",
    "unpack_ternary",
    "unpack_trits",
    "unpack_uniform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
