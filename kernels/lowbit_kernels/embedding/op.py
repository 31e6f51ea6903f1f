"""Embedding lookup in packed tables: ids -> rows, gathered packed and unpacked on the way.

    out[i] = scale[ids[i]] * code[ids[i]]                      bits 1 (lb1), 2 (lb2) or 8 (int8)
    out[i] = scale[0, id] * b1[id] + scale[1, id] * b2[id]     a split pair (bits 2, scale [2, V])

A row of BERT-base moves 192 bytes (2 bits) instead of 3,072.
"""

from __future__ import annotations

import torch

from .._ops import FLOATS, check_choice, check_device, check_tensor, define
from .cpu import _embedding_cpu
from .gpu import launch

ID_DTYPES = (torch.int64, torch.int32)


def _embedding_fake(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, dim: int, out_dtype: torch.dtype
) -> torch.Tensor:
    return packed.new_empty(ids.shape[0], dim, dtype=out_dtype)


embedding_op = define(
    "quantized_embedding(Tensor ids, Tensor packed, Tensor scale, int bits, int dim, ScalarType out_dtype) -> Tensor",
    cpu=_embedding_cpu,
    cuda=launch,
    fake=_embedding_fake,
)


def quantized_embedding(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    *,
    embedding_dim: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Look up rows of a packed embedding table.

    Args:
        ids: int64 or int32 [...].
        packed: uint8 [V, bytes] of `pack_ternary` or `pack_split` (bits 2) or `pack_binary` (bits 1); int8 [V, D] (8).
        scale: float32 [V] or [1]; [2, V] or [2, 1] for a split pair.
        bits: 1, 2 or 8.
        embedding_dim: D; default: every packed column.
        out_dtype: float32, float16, bfloat16 or float64.

    Returns:
        [..., D].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
        IndexError: an id outside the table (CPU; on CUDA such a row is NaN, since a check would stall the device).
    """
    dim = check_table(ids, packed, scale, "bits", bits, embedding_dim)
    check_choice("out_dtype", out_dtype, FLOATS)
    check_device(ids=ids, packed=packed, scale=scale)
    return embedding_op(ids.reshape(-1), packed, scale, bits, dim, out_dtype).reshape(*ids.shape, dim)


def check_table(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bits_name: str,
    bits: int,
    embedding_dim: int | None,
) -> int:
    """Raise TypeError or ValueError unless these fit each other; returns the number of columns of a row."""
    check_tensor("ids", ids, ID_DTYPES)
    check_choice(bits_name, bits, (1, 2, 8))
    check_tensor("packed", packed, (torch.int8 if bits == 8 else torch.uint8,), ndim=2)
    check_tensor("scale", scale, (torch.float32,))
    per_byte = {1: 8, 2: 4, 8: 1}[bits]
    block = 1 if bits == 8 else 32 * per_byte
    columns = packed.shape[1] * per_byte
    dim = columns if embedding_dim is None else embedding_dim
    if not isinstance(dim, int | torch.SymInt) or dim < 0 or -(-dim // block) * block != columns:
        raise ValueError(
            f"embedding_dim={dim} does not fit {packed.shape[1]} packed bytes a row (up to {columns} columns)"
        )
    V = packed.shape[0]
    if tuple(scale.shape) not in (((V,), (1,)) if bits != 2 else ((V,), (1,), (2, V), (2, 1))):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, expected [{V}] or [1] (split pair, bits 2: [2, {V}] or [2, 1])"
        )
    return dim
