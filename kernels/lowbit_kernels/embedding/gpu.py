"""`embedding`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .._triton import tl, triton

INT8, TERNARY, BINARY, SPLIT = 0, 1, 2, 3  # `LAYOUT` of the kernel


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
