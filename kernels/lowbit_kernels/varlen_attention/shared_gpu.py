"""`varlen_attention`: what Triton kernels of both directions share. The formula is in `op.py`."""

from __future__ import annotations

from collections.abc import Sequence

from .._triton import tl, triton
from ..quantize.gpu import _rint, _scale_and_zero
from .cpu import SITES

HEAD_DIMS = (16, 32, 64, 128)  # of the Triton kernels


@triton.jit
def _sequence(cu_seqlens_ptr, T, blocks, BLOCK_M: tl.constexpr):
    """(first token, length, first query) of this program; what lies beyond T is never touched."""
    sequence = tl.program_id(0) // blocks
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), T) - start
    return start, length, (tl.program_id(0) % blocks) * BLOCK_M


@triton.jit
def _load(x_ptr, start, row, length, stride_t, D: tl.constexpr):
    """Rows of one sequence and head, [len(row), D]; 0 beyond its end."""
    x_ptrs = x_ptr + (start + row).to(tl.int64)[:, None] * stride_t + tl.arange(0, D)[None, :]
    return tl.load(x_ptrs, mask=(row < length)[:, None], other=0.0)


@triton.jit
def _store(out_ptr, out, start, row, length, H, head, D: tl.constexpr):
    out_ptrs = out_ptr + ((start + row).to(tl.int64)[:, None] * H + head) * D + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def _load_bias(bias_ptr, row, column, length, stride_row, stride_column):
    """[len(row), len(column)] in units of log2; 0 beyond the sequence."""
    bias_ptrs = bias_ptr + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    bias = tl.load(bias_ptrs, mask=(row < length)[:, None] & (column < length)[None, :], other=0.0)
    return bias.to(tl.float32) * 1.4426950408889634


@triton.jit
def _quantized(x, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Rows [rows, D] -> codes in float32, scales [rows], zero points [rows]; NaN for bad rows."""
    QMAX: tl.constexpr = 2 ** (BITS - 1) - 1
    x = x.to(tl.float32)
    poison = tl.sum(x - x, axis=1)  # NaN where x holds NaN, which min and max would drop, or infinity
    low = tl.min(x, axis=1) + poison
    high = tl.max(x, axis=1) + poison
    scale, inverse, zero = _scale_and_zero(low, high, BITS, SYMMETRIC)
    codes = _rint(x * inverse[:, None])
    if not SYMMETRIC:
        codes = tl.minimum(codes + zero[:, None], QMAX)
    return codes, scale, zero


@triton.jit
def _operand(codes):
    """Codes as the tensor cores take them: int8 needs 32 columns, float16 does not and is exact for codes too."""
    if codes.shape[1] < 32:
        return codes.to(tl.float16)
    else:
        return codes.to(tl.int8)


@triton.jit
def _scores(
    row_codes, row_scale, row_zero, row_sum, x_ptr, start, column, length, stride_t,
    BITS: tl.constexpr, SYMMETRIC_ROW: tl.constexpr, SYMMETRIC_COLUMN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Scores of rows, quantized already, with one block of tokens, by columns; what is beyond the sequence is 0.

    sum_d (r - zr)(c - zc) = sum_d r c - zc sum_d r - zr sum_d (c - zc), the corrections in float32: zero points of rows
    far from 0 are large, but then so is the score.
    """
    codes, scale, zero = _quantized(_load(x_ptr, start, column, length, stride_t, D), BITS, SYMMETRIC_COLUMN)
    scores = tl.dot(row_codes, tl.trans(_operand(codes))).to(tl.float32)
    if not SYMMETRIC_COLUMN:
        scores -= row_sum[:, None] * zero[None, :]
    if not SYMMETRIC_ROW:
        scores -= row_zero[:, None] * (tl.sum(codes, axis=1) - D * zero)[None, :]
    return scores * row_scale[:, None] * scale[None, :]


def _flags(asymmetric: Sequence[str]) -> dict[str, bool]:
    return {f"SYMMETRIC_{site.split('_')[-1].upper()}": site not in asymmetric for site in SITES}
