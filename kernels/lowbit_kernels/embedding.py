"""Embedding lookup in packed tables: ids -> rows, gathered packed and unpacked on the way.

    out[i] = scale[ids[i]] * code[ids[i]]                      bits 1 (lb1), 2 (lb2) or 8 (int8)
    out[i] = scale[0, id] * b1[id] + scale[1, id] * b2[id]     a split pair (bits 2, scale [2, V])

A row of BERT-base moves 192 bytes (2 bits) instead of 3,072.
"""

from __future__ import annotations

import torch

from ._ops import FLOATS, check_choice, check_device, check_tensor, define
from ._triton import tl, triton
from .packing import unpack_binary, unpack_split, unpack_ternary

INT8, TERNARY, BINARY, SPLIT = 0, 1, 2, 3  # `LAYOUT` of the kernel
ID_DTYPES = (torch.int64, torch.int32)

# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def table_row(ids_ptr, rows):
    """(row of the id, whether it is one of `rows`); row 0 where it is not, which is then not to be read."""
    row = tl.load(ids_ptr).to(tl.int64)
    valid = (row >= 0) & (row < rows)
    return tl.where(valid, row, 0), valid


@triton.jit
def row_scales(scale_ptr, row, valid, stride_scale, stride_plane, LAYOUT: tl.constexpr):
    """The scale of a row, NaN for an invalid one, and that of its second plane."""
    scale = tl.where(valid, tl.load(scale_ptr + row * stride_scale, mask=valid, other=0.0), float("nan"))
    scale2 = scale
    if LAYOUT == 3:
        scale2 = tl.load(scale_ptr + stride_plane + row * stride_scale, mask=valid, other=0.0)
    return scale, scale2


@triton.jit
def values(packed, plane, scale, scale2, LAYOUT: tl.constexpr):
    """The float32 values in plane `plane` of the bytes."""
    bits = packed.to(tl.int32)
    if LAYOUT == 0:
        return bits.to(tl.float32) * scale
    elif LAYOUT == 1:
        return (((bits >> (6 - 2 * plane)) & 3) - 1).to(tl.float32) * scale
    elif LAYOUT == 2:
        return (((bits >> plane) & 1) * 2 - 1).to(tl.float32) * scale
    else:
        y = (((bits >> (7 - 2 * plane)) & 1) * 2 - 1).to(tl.float32) * scale
        return y + (((bits >> (6 - 2 * plane)) & 1) * 2 - 1).to(tl.float32) * scale2


@triton.jit
def _embedding_kernel(
    ids_ptr, w_ptr, scale_ptr, out_ptr, V, row_bytes, dim, stride_scale, stride_plane,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an id. An id out of range reads nothing and writes NaN."""
    program = tl.program_id(0).to(tl.int64)
    row, valid = table_row(ids_ptr + program, V)
    byte = tl.arange(0, BLOCK)
    packed = tl.load(w_ptr + row * row_bytes + byte, mask=byte < tl.where(valid, row_bytes, 0), other=0)
    scale, scale2 = row_scales(scale_ptr, row, valid, stride_scale, stride_plane, LAYOUT)
    PLANES: tl.constexpr = 1 if LAYOUT == 0 else 8 if LAYOUT == 2 else 4
    column = byte if LAYOUT == 0 else (byte // 32) * (32 * PLANES) + byte % 32
    out_ptr += program * dim
    for plane in tl.static_range(PLANES):
        k = column + 32 * plane
        y = values(packed, plane, scale, scale2, LAYOUT).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + k, y, mask=(byte < row_bytes) & (k < dim))


def layout_of(scale: torch.Tensor, bits: int) -> int:
    """`LAYOUT` of a table with that scale and that many bits."""
    return SPLIT if scale.dim() == 2 else {8: INT8, 2: TERNARY, 1: BINARY}[bits]


def launch(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, dim: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """Run the Triton kernel; arguments as the op's, already validated."""
    out = torch.empty(ids.shape[0], dim, dtype=out_dtype, device=packed.device)
    if out.numel():
        packed, scale = packed.contiguous(), scale.contiguous()
        _embedding_kernel[(ids.shape[0],)](
            ids.contiguous(), packed, scale, out, packed.shape[0], packed.shape[1], dim,
            int(scale.shape[-1] > 1), scale.shape[-1],
            LAYOUT=layout_of(scale, bits), BLOCK=triton.next_power_of_2(packed.shape[1]),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    cases = []
    for layout, name in ((INT8, "int8"), (TERNARY, "ternary"), (BINARY, "binary"), (SPLIT, "split")):
        signature = {"ids_ptr": "*i64", "w_ptr": "*i8" if layout == INT8 else "*u8"}
        signature |= {"scale_ptr": "*fp32", "out_ptr": "*fp32"}
        signature |= dict.fromkeys(("V", "row_bytes", "dim", "stride_scale", "stride_plane"), "i32")
        block = 1024 if layout == INT8 else 256
        cases.append((f"embedding {name}", _embedding_kernel, signature, {"LAYOUT": layout, "BLOCK": block}, 4, 3))
    return cases


# ------------------------------------------------------------------------------------------------------------- CPU


def check_ids(name: str, ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError unless all ids are rows of the table."""
    low, high = torch.aminmax(ids)
    if low < 0 or high >= rows:
        raise IndexError(f"{name} reach from {int(low)} to {int(high)}, the table has rows 0 to {rows - 1}")


def _embedding_cpu(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, dim: int, out_dtype: torch.dtype
) -> torch.Tensor:
    if ids.numel() == 0:
        return packed.new_empty(0, dim, dtype=out_dtype)
    check_ids("ids", ids, packed.shape[0])
    return gather_rows(ids, packed, scale, bits, dim, out_dtype)


def gather_rows(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, dim: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """The op in torch's own, for ids that are rows of the table."""
    rows = packed.index_select(0, ids)
    scale = scale.expand(*scale.shape[:-1], packed.shape[0]).index_select(-1, ids).unsqueeze(-1)
    if scale.dim() == 3:
        first, second = unpack_split(rows, dim)
        return (first * scale[0] + second * scale[1]).to(out_dtype)
    codes = rows[:, :dim] if bits == 8 else (unpack_ternary if bits == 2 else unpack_binary)(rows, dim)
    return (codes * scale).to(out_dtype)


# -------------------------------------------------------------------------------------------------------------- op


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
