"""BERT's embeddings in one pass over each row: packed word row + token type row + position row, then LayerNorm.

    v = (word + token_type_table[token_type_ids]) + position_table[position_ids]      word: formulas in embedding.py
    y = LayerNorm(v) * weight + bias; codes = quantize_per_token(y)                   formulas in layernorm.py

Rows and both sums are rounded to the output dtype and added in this order, so that the result is that of
`quantized_embedding`, two additions and `add_layernorm`. On a GPU that chain writes and reads three [tokens, K] floats
that never leave the registers here; on a CPU, where the native kernel takes them, the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from . import native
from ._ops import FLOATS, SINGLE, check_choice, check_device, check_tensor, define
from ._triton import tl, triton
from .embedding import (
    BINARY,
    ID_DTYPES,
    INT8,
    SPLIT,
    TERNARY,
    check_ids,
    check_table,
    embedding_op,
    layout_of,
    row_scales,
    table_row,
    values,
)
from .layernorm import (
    Normalized,
    add_layernorm_cpu,
    check_layernorm,
    code_outputs,
    fake_with_codes,
    normalize_row,
    row_tile,
    shaped,
    traceable,
    traced,
    with_codes,
)

# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _float_row(ids_ptr, table_ptr, rows, K, k):
    """Row of a float table in float32, NaN for an id out of range."""
    row, valid = table_row(ids_ptr, rows)
    x = tl.load(table_ptr + row * K + k, mask=k < tl.where(valid, K, 0), other=0.0)
    return tl.where(valid, x.to(tl.float32), float("nan"))


@triton.jit(do_not_specialize=["type_ids", "position_ids"])
def _embedding_layernorm_kernel(
    ids_ptr, w_ptr, word_scale_ptr, type_ids_ptr, type_table_ptr, position_ids_ptr, position_table_ptr,
    weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, zero_ptr,
    V, row_bytes, stride_scale, stride_plane, type_ids, types, position_ids, positions, K, eps,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an id. Its columns are in the order of the sum, so a packed byte is loaded by each of its columns."""
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k < K
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row, valid = table_row(ids_ptr + program, V)
    scale, scale2 = row_scales(word_scale_ptr, row, valid, stride_scale, stride_plane, LAYOUT)
    PLANES: tl.constexpr = 1 if LAYOUT == 0 else 8 if LAYOUT == 2 else 4
    byte = k if LAYOUT == 0 else (k // (32 * PLANES)) * 32 + k % 32
    # Not `mask & valid`: Triton 3.9's interpreter refuses masks that join a block of conditions with a single one.
    packed = tl.load(w_ptr + row * row_bytes + byte, mask=k < tl.where(valid, K, 0), other=0)
    v = values(packed, k // 32 % PLANES, scale, scale2, LAYOUT).to(dtype).to(tl.float32)
    # Ids that are shared by sequences are not repeated in memory: `type_ids` and `position_ids` are how many there are.
    token_type = _float_row(type_ids_ptr + program % type_ids, type_table_ptr, types, K, k)
    v = (v + token_type.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    position = _float_row(position_ids_ptr + program % position_ids, position_table_ptr, positions, K, k)
    v = (v + position.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    normalize_row(
        v, program.to(tl.int64), k, mask, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, zero_ptr, K, eps,
        BITS, SYMMETRIC,
    )  # fmt: skip


def launch(
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
    """Run the Triton kernel; arguments as the op's, already validated."""
    K = weight.shape[0]
    tile = row_tile(K)
    y = weight.new_empty(ids.shape[0], K, dtype=out_dtype)
    if not y.numel():
        return with_codes(y, bits, symmetric)
    codes = code_outputs(y, bits, symmetric)
    scale = scale.contiguous()
    _embedding_layernorm_kernel[(ids.shape[0],)](
        ids.contiguous(), packed.contiguous(), scale, token_type_ids.contiguous(), token_type_table.contiguous(),
        position_ids.contiguous(), position_table.contiguous(), weight.contiguous(), bias.contiguous(), y, *codes,
        packed.shape[0], packed.shape[1], int(scale.shape[-1] > 1), scale.shape[-1],
        token_type_ids.shape[0], token_type_table.shape[0], position_ids.shape[0], position_table.shape[0], K, eps,
        LAYOUT=layout_of(scale, embedding_bits), BITS=bits, SYMMETRIC=symmetric, **tile,
    )  # fmt: skip
    return y, *codes


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    cases = []
    ids = dict.fromkeys(("ids_ptr", "type_ids_ptr", "position_ids_ptr"), "*i64")
    integers = ("V", "row_bytes", "stride_scale", "stride_plane", "type_ids", "types", "position_ids", "positions")
    for layout, name in ((INT8, "int8"), (TERNARY, "ternary"), (BINARY, "binary"), (SPLIT, "split")):
        for dtype, bits, symmetric in (("*fp32", 0, True), ("*bf16", 8, True), ("*fp32", 8, False)):
            tile = row_tile(1024)  # also that of 768
            floats = ("type_table_ptr", "position_table_ptr", "weight_ptr", "bias_ptr", "y_ptr")
            signature = {"w_ptr": "*i8" if layout == INT8 else "*u8", "word_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
            signature |= {"q_ptr": "*i8", "zero_ptr": "*i32"} | ids | dict.fromkeys(floats, dtype)
            signature |= dict.fromkeys(integers, "i32") | {"row_bytes": "i32:16", "K": "i32:16", "eps": "fp32"}
            constants = {"LAYOUT": layout, "BITS": bits, "SYMMETRIC": symmetric, "BLOCK": tile["BLOCK"]}
            constants["enable_fp_fusion"] = tile["enable_fp_fusion"]
            codes = "" if not bits else " symmetric" if symmetric else " asymmetric"
            label = f"embedding_layernorm {name}{codes} {dtype} {tile['BLOCK']}"
            cases.append((label, _embedding_layernorm_kernel, signature, constants, tile["num_warps"], 3))
    return cases


# ------------------------------------------------------------------------------------------------------------- CPU


def _sum(
    word: torch.Tensor,
    token_type_ids: torch.Tensor,
    token_type_table: torch.Tensor,
    position_ids: torch.Tensor,
    position_table: torch.Tensor,
) -> torch.Tensor:
    """word [M, K] plus the rows of both tables, whose ids are as many as M or repeat after fewer."""
    for ids, table in ((token_type_ids, token_type_table), (position_ids, position_table)):
        rows = functional.embedding(ids, table).to(word.dtype)
        word = (word.view(-1, *rows.shape) + rows).view(word.shape)
    return word


def _single(token_type_table: torch.Tensor, position_table: torch.Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the native kernel takes these."""
    return token_type_table.dtype == position_table.dtype == out_dtype == torch.float32


def _embedding_layernorm_cpu(
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
    M, K = ids.shape[0], weight.shape[0]
    y = weight.new_empty(M, K, dtype=out_dtype)
    if not M or not K:
        return with_codes(y, bits, symmetric)
    if native.available() and _single(token_type_table, position_table, out_dtype):
        # Names hold them until the call is over: the structures have pointers only.
        ids, token_type_ids, position_ids = ids.long(), token_type_ids.long(), position_ids.long()
        words, types, positions = ids.contiguous(), token_type_ids.contiguous(), position_ids.contiguous()
        packed, scale = packed.contiguous(), scale.contiguous()
        token_type_table, position_table = token_type_table.contiguous(), position_table.contiguous()
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        codes = code_outputs(y, bits, symmetric)
        embeddings = native.Embeddings(
            (words.data_ptr(), M, packed.shape[0]),
            (types.data_ptr(), types.shape[0], token_type_table.shape[0]),
            (positions.data_ptr(), positions.shape[0], position_table.shape[0]),
            packed.data_ptr(), packed.shape[1], K, embedding_bits, scale.data_ptr(),
            scale[1].data_ptr() if scale.dim() == 2 else None, scale.shape[-1] > 1,
            token_type_table.data_ptr(), position_table.data_ptr(),
        )  # fmt: skip
        if native.function("embedding_layernorm")(
            embeddings, M, native.norm(weight, bias, eps), bits, y.data_ptr(), *map(native.pointer, codes)
        ):
            return y, *codes
    # The kernel has looked at the ids too, in less time, but does not say which is wrong.
    check_ids("token_type_ids", token_type_ids, token_type_table.shape[0])
    check_ids("position_ids", position_ids, position_table.shape[0])
    word = embedding_op(ids, packed, scale, embedding_bits, K, out_dtype)
    v = _sum(word, token_type_ids, token_type_table, position_ids, position_table)
    return add_layernorm_cpu(v, None, weight, bias, eps, bits, symmetric)


# -------------------------------------------------------------------------------------------------------------- op


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
