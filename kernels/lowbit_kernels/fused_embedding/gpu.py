"""`fused_embedding`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .._triton import tl, triton
from ..embedding.gpu import BINARY, INT8, SPLIT, TERNARY, layout_of, row_scales, table_row, values
from ..layernorm.cpu import code_outputs, with_codes
from ..layernorm.gpu import normalize_row, row_tile
from ..layernorm.shared import Normalized


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
