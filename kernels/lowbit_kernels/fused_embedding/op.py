"""BERT's embeddings in one pass over each row: packed word row + token type row + position row, then LayerNorm.

    v = (word + token_type_table[token_type_ids]) + position_table[position_ids]      word: formulas in embedding/op.py
    y = LayerNorm(v) * weight + bias; codes = quantize_per_token(y)                   formulas in layernorm/op.py

Rows and both sums are rounded to the output dtype and added in this order, so that the result is that of
`quantized_embedding`, two additions and `add_layernorm`. On a GPU that chain writes and reads three [tokens, K] floats
that never leave the registers here; on a CPU, where the native kernel takes them, the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from .._ops import FLOATS, SINGLE, check_choice, check_device, check_tensor, define
from ..embedding.op import ID_DTYPES, check_table, embedding_op
from ..layernorm.cpu import traceable, traced
from ..layernorm.op import check_layernorm, fake_with_codes, shaped
from ..layernorm.shared import Normalized
from .cpu import _embedding_layernorm_cpu, _single, _sum
from .gpu import launch


def _embedding_layernorm_fake(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    embedding_bits: int,
    token_type_ids: torch.Tensor,
    token_type_table: torch.Tensor,
    position_ids: torch.Tensor,
    position_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Normalized:
    return fake_with_codes(weight.new_empty(ids.shape[0], weight.shape[0], dtype=out_dtype), bits, symmetric)


_op = define(
    "embedding_layernorm(Tensor ids, Tensor packed, Tensor scale, int embedding_bits, Tensor token_type_ids, "
    "Tensor token_type_table, Tensor position_ids, Tensor position_table, Tensor weight, Tensor bias, float eps, "
    "int bits, bool symmetric, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_embedding_layernorm_cpu,
    cuda=launch,
    fake=_embedding_layernorm_fake,
)


def embedding_layernorm(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    embedding_bits: int,
    token_type_ids: torch.Tensor,
    token_type_table: torch.Tensor,
    position_ids: torch.Tensor,
    position_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-12,
    *,
    bits: int | None = None,
    symmetric: bool = True,
    out_dtype: torch.dtype = torch.float32,
) -> Any:
    """LayerNorm of word + token type + position embeddings, with the int8 codes of the result on request; no gradient.

    Args:
        ids: int64 or int32 [...].
        packed, scale, embedding_bits: the word table, as `packed`, `scale` and `bits` of `quantized_embedding`.
        token_type_ids, position_ids: int64 or int32, like ids or its last dimensions (those before may be 1, as in
            position_ids [1, S] for ids [B, S]).
        token_type_table, position_table: float [rows, K].
        weight, bias: float [K]; on CUDA K is at most 8192.
        eps: added to the variance.
        bits: None, or 8 or 4 to quantize the result as `quantize_per_token` does.
        symmetric: without or with a zero point.
        out_dtype: float32, float16 or bfloat16; rows and sums are rounded to it before the LayerNorm.

    Returns:
        y [..., K]. With bits: (y, codes int8 [..., K], scale float32 [...], zero_point int32 [...] or None), where a
        row with NaN or infinity in y has scale NaN.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, naming the argument.
        IndexError: an id outside its table (CPU; on CUDA such a row is NaN, since a check would stall the device). In
            code that torch.compile made for the CPU, a token type or position id raises Inductor's RuntimeError where
            no native kernel takes the tables (they are float32, and so is `out_dtype`).
    """
    tables = {"token_type_table": token_type_table, "position_table": position_table}
    check_tensor("weight", weight, FLOATS, ndim=1)
    K = weight.shape[0]
    check_layernorm(K, weight, bias, eps, bits, symmetric)
    check_table(ids, packed, scale, "embedding_bits", embedding_bits, K)
    check_choice("out_dtype", out_dtype, SINGLE)
    for name, table in tables.items():
        check_tensor(name, table, FLOATS, ndim=2)
        if table.shape[1] != K:
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected [rows, {K}]")
    token_type_ids = _repeating("token_type_ids", token_type_ids, ids)
    position_ids = _repeating("position_ids", position_ids, ids)
    check_device(
        ids=ids, packed=packed, scale=scale, token_type_ids=token_type_ids, position_ids=position_ids, **tables,
        weight=weight, bias=bias,
    )  # fmt: skip
    token_type_table, position_table = token_type_table.detach(), position_table.detach()
    weight, bias = weight.detach(), bias.detach()
    rows = ids.reshape(-1)
    natively = _single(token_type_table, position_table, out_dtype)
    if traceable(ids, natively, out_dtype, bits) and rows.numel() and K:
        word = embedding_op(rows, packed, scale, embedding_bits, K, out_dtype)
        v = _sum(word, token_type_ids, token_type_table, position_ids, position_table)
        return traced(v.reshape(*ids.shape, K), weight, bias, eps, bits, symmetric, out_dtype)
    result = _op(
        rows, packed, scale, embedding_bits, token_type_ids, token_type_table, position_ids, position_table,
        weight, bias, eps, bits or 0, symmetric, out_dtype,
    )  # fmt: skip
    return shaped(result, ids.shape, bits, symmetric)


def _repeating(name: str, other: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`other` as a vector whose repetition gives one id for each of `ids`."""
    check_tensor(name, other, ID_DTYPES)
    shape = tuple(other.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    if shape != tuple(ids.shape)[ids.dim() - len(shape) :]:
        raise ValueError(f"{name} has shape {tuple(other.shape)}, expected {tuple(ids.shape)} or its last dimensions")
    return other.reshape(-1)
