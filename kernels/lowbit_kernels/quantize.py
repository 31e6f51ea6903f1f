"""Activation quantization: float [M, K] -> int8 codes, float32 scale, int32 zero point; x ~ scale * (q - zero_point).

    symmetric    scale = max|x| / qmax                q = rint(x * (1/scale)),  qmax = 2^(bits-1) - 1
    asymmetric   scale = (max - min) / (2^bits - 1)   q = clamp(rint(x * (1/scale)) + zero_point, qmin, qmax)
                 zero_point = qmin - rint(min * (1/scale)),  qmin = -2^(bits-1)

(TernaryBERT section 3.1 min-max, with an integer zero point so that integer products can subtract it.) Arithmetic is
float32, rounding half to even, divisions correctly rounded: CPU and GPU give the same bytes. A row of zeros has scale
0 and a constant row c scale |c|; NaN, infinity or a range beyond float32 make the scale NaN. Bound by memory: 4 bytes
read and 1 written per value on a GPU.
"""

from __future__ import annotations

import math

import torch

from . import native
from ._ops import FLOATS, check_choice, check_device, check_flag, check_tensor, define, stored, traced_on_cpu
from ._triton import tl, triton

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# A smaller scale (the smallest normal float32) has no accurate reciprocal: it counts as 0.
TINY = 2.0**-126
# An asymmetric scale this far below the values cannot resolve them in float32, and would overflow the zero point.
FLAT = 2.0**-30

# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _rint(x):
    """Round half to even: adding 2^23 to |x| leaves no fraction bits. The abs keeps x*y+c from becoming an FMA."""
    magnitude = tl.abs(x)
    rounded = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _extrema(x_ptr, length, BLOCK: tl.constexpr):
    """Least and largest of `length` values; NaN where one is NaN or infinite (min and max would drop a NaN)."""
    offs = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        mask = start + offs < length
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(mask, x, float("inf")))
        high = tl.maximum(high, tl.where(mask, x, float("-inf")))
        poison += x - x
    return _reduced(low, high, poison)


@triton.jit
def _reduced(low, high, poison, AXIS: tl.constexpr = 0):
    """One (least, largest) of a vector of them; NaN where one of `poison` is."""
    nan = tl.sum(poison, axis=AXIS)
    return tl.min(low, axis=AXIS) + nan, tl.max(high, axis=AXIS) + nan


@triton.jit
def _scale_and_zero(low, high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Twin of `_scale_and_zero_torch`: (scale, 1/scale or 0, zero point)."""
    TINY: tl.constexpr = 2.0**-126
    QMAX: tl.constexpr = 2 ** (BITS - 1) - 1
    magnitude = tl.maximum(high, -low)
    levels = magnitude * 0.0 + (QMAX if SYMMETRIC else 2 * QMAX + 1)  # div_rn takes tensors, not constants
    if SYMMETRIC:
        scale = tl.div_rn(magnitude, levels)
    else:
        scale = tl.div_rn(high - low, levels)
        scale += scale - scale  # the range may overflow where the values do not
        scale = tl.where((scale < magnitude * 2.0**-30) | (scale < TINY), magnitude, scale)
    small = scale < TINY
    scale = tl.where(small, 0.0, scale)
    inverse = tl.where(small, 0.0, tl.div_rn(levels * 0.0 + 1.0, tl.where(small, 1.0, scale)))
    zero = levels * 0.0
    if not SYMMETRIC:
        zero = (-QMAX - 1.0) - _rint(low * inverse)
    return scale, inverse, zero


@triton.jit
def _to_int8(q, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Rounded q as int8: saturated, NaN becomes 0."""
    return tl.where(q == q, tl.minimum(tl.maximum(q, QMIN), QMAX), 0.0).to(tl.int8)


@triton.jit
def _to_codes(x, inverse, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """int8 codes of float32 values; 0 where a value or its scale is NaN."""
    QMAX: tl.constexpr = 2 ** (BITS - 1) - 1
    QMIN: tl.constexpr = -QMAX if SYMMETRIC else -QMAX - 1
    return _to_int8(_rint(x * inverse) + zero, QMIN, QMAX)


@triton.jit
def _store_codes(x_ptr, q_ptr, length, inverse, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        mask = start + offs < length
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(q_ptr + start + offs, _to_codes(x, inverse, zero, BITS, SYMMETRIC), mask=mask)


@triton.jit
def _store_scale_and_zero(scale_ptr, zero_ptr, scale, zero, SYMMETRIC: tl.constexpr):
    tl.store(scale_ptr, scale)
    if not SYMMETRIC:
        tl.store(zero_ptr, tl.where(zero == zero, zero, 0.0).to(tl.int32))


@triton.jit
def quantize_row(x, mask, k, q_ptr, scale_ptr, zero_ptr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """For kernels that hold a whole float32 row: what `_row_kernel` stores for it. `mask` marks its columns `k`."""
    low, high, poison = tl.where(mask, x, float("inf")), tl.where(mask, x, float("-inf")), tl.where(mask, x - x, 0.0)
    low, high = _reduced(low, high, poison)
    scale, inverse, zero = _scale_and_zero(low, high, BITS, SYMMETRIC)
    _store_scale_and_zero(scale_ptr, zero_ptr, scale, zero, SYMMETRIC)
    tl.store(q_ptr + k, _to_codes(x, inverse, zero, BITS, SYMMETRIC), mask=mask)


@triton.jit
def _row_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, K, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row; the second read of the row comes from cache."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    low, high = _extrema(x_ptr, K, BLOCK)
    scale, inverse, zero = _scale_and_zero(low, high, BITS, SYMMETRIC)
    _store_scale_and_zero(scale_ptr + row, zero_ptr + row, scale, zero, SYMMETRIC)
    _store_codes(x_ptr, q_ptr + row * K, K, inverse, zero, BITS, SYMMETRIC, BLOCK)


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def _fake_kernel(
    x_ptr, out_ptr, rows, size1, size2, K,
    stride_x0, stride_x1, stride_x2, stride_xk, stride_o0, stride_o1, stride_o2, stride_ok,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x [size0, size1, size2, K], in any strides: read once, kept in registers, written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK).to(tl.int64)
    within = (k < K)[None, :]
    mask = (row < rows)[:, None] & within
    i0, i1, i2 = row // size2 // size1, row // size2 % size1, row % size2
    x_ptr += (i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2)[:, None] + (k * stride_xk)[None, :]
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    low, high = tl.where(within, x, float("inf")), tl.where(within, x, float("-inf"))
    low, high = _reduced(low, high, x - x, 1)
    scale, inverse, zero = _scale_and_zero(low, high, BITS, SYMMETRIC)
    codes = _to_codes(x, inverse[:, None], zero[:, None], BITS, SYMMETRIC).to(tl.float32)
    out_ptr += (i0 * stride_o0 + i1 * stride_o1 + i2 * stride_o2)[:, None] + (k * stride_ok)[None, :]
    tl.store(out_ptr, ((codes - zero[:, None]) * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _extrema_kernel(x_ptr, low_ptr, high_ptr, n, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Extrema of chunk p of a whole tensor."""
    p = tl.program_id(0).to(tl.int64)
    low, high = _extrema(x_ptr + p * CHUNK, tl.minimum(n - p * CHUNK, CHUNK).to(tl.int32), BLOCK)
    tl.store(low_ptr + p, low)
    tl.store(high_ptr + p, high)


@triton.jit
def _chunk_kernel(
    x_ptr, q_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, n, chunks,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program finds the tensor's extrema among the chunks' (the same order for all), then quantizes its chunk."""
    p = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks, BLOCK):
        mask = start + offs < chunks
        chunk_low = tl.load(low_ptr + start + offs, mask=mask, other=float("inf"))
        low = tl.minimum(low, chunk_low)
        high = tl.maximum(high, tl.load(high_ptr + start + offs, mask=mask, other=float("-inf")))
        poison += tl.where(mask, chunk_low - chunk_low, 0.0)
    low, high = _reduced(low, high, poison)
    scale, inverse, zero = _scale_and_zero(low, high, BITS, SYMMETRIC)
    if p == 0:
        _store_scale_and_zero(scale_ptr, zero_ptr, scale, zero, SYMMETRIC)
    length = tl.minimum(n - p * CHUNK, CHUNK).to(tl.int32)
    _store_codes(x_ptr + p * CHUNK, q_ptr + p * CHUNK, length, inverse, zero, BITS, SYMMETRIC, BLOCK)


MAX_BLOCK = 4096  # values held in registers by one program of 8 warps
CHUNK = 16384  # values a program when one scale serves the whole tensor
MAX_HELD = 16384  # the longest row that fake quantization keeps in registers, by 16 warps


def launch_per_token(x: torch.Tensor, bits: int, symmetric: bool) -> Quantized:
    """Run the Triton kernel on float [M, K]; the zero point is empty when symmetric."""
    if not x.numel():
        return outputs_of_empty(x, symmetric, x.shape[0])
    x = x.contiguous()
    q, scale, zero_point = outputs(x, symmetric, x.shape[0])
    block = min(triton.next_power_of_2(x.shape[1]), MAX_BLOCK)
    _row_kernel[(x.shape[0],)](
        x, q, scale, zero_point, x.shape[1],
        BITS=bits, SYMMETRIC=symmetric, BLOCK=block, num_warps=4 if block <= 1024 else 8, enable_fp_fusion=True,
    )  # fmt: skip
    return q, scale, zero_point


def launch_fake_per_token(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Run the Triton kernel on float [..., K], not empty; the result has x's strides where those are dense.

    Views as attention passes them, [B, S, H, D] transposed to [B, H, S, D], are not copied.
    """
    K = x.shape[-1]
    out = torch.empty_like(x)
    if x.dim() > 4 or K > MAX_HELD:
        return out.copy_(_fake_of_rows(x.reshape(-1, K), bits, symmetric).view(x.shape))
    x4, out4 = (tensor[(None,) * (4 - x.dim())] for tensor in (x, out))
    rows, block = x.numel() // K, triton.next_power_of_2(K)
    _fake_kernel[(triton.cdiv(rows, _rows_held(block)),)](
        x4, out4, rows, x4.shape[1], x4.shape[2], K, *x4.stride(), *out4.stride(),
        BITS=bits, SYMMETRIC=symmetric, ROWS=_rows_held(block), BLOCK=block,
        num_warps=warps_holding(block), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _fake_of_rows(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    if x.shape[1] <= MAX_HELD:
        return launch_fake_per_token(x, bits, symmetric)
    q, scale, zero_point = launch_per_token(x, bits, symmetric)
    codes = q.float() if symmetric else q.float() - zero_point.unsqueeze(1)
    return (codes * scale.unsqueeze(1)).to(x.dtype)


def _rows_held(block: int) -> int:
    """Rows a program: the heads of attention have 64 values, too few for one."""
    return max(1, 1024 // block)


def warps_holding(block: int) -> int:
    """Warps for a program that keeps rows of `block` values (at least 1024 in all) in registers."""
    return min(max(block // 512, 4), 16)


def launch_per_tensor(
    x: torch.Tensor, bits: int, symmetric: bool, scale: torch.Tensor | None, zero_point: torch.Tensor | None
) -> Quantized:
    """Run the Triton kernels with one scale; a static scale needs no reduction and takes torch's elementwise ops."""
    if scale is not None:
        return _static(x, bits, symmetric, scale, zero_point)
    n = x.numel()
    if not n:
        return outputs_of_empty(x, symmetric, 1)
    x = x.contiguous()
    q, new_scale, new_zero = outputs(x, symmetric, 1)
    chunks = triton.cdiv(n, CHUNK)
    low, high = new_scale.new_empty(chunks), new_scale.new_empty(chunks)
    options = {"CHUNK": CHUNK, "BLOCK": MAX_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
    _extrema_kernel[(chunks,)](x, low, high, n, **options)
    _chunk_kernel[(chunks,)](x, q, low, high, new_scale, new_zero, n, chunks, BITS=bits, SYMMETRIC=symmetric, **options)
    return q, new_scale, new_zero


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    cases = []
    for symmetric in (True, False):
        flags = {"BITS": 8, "SYMMETRIC": symmetric}
        name = "symmetric" if symmetric else "asymmetric"
        outputs = {"q_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32"}
        for block in (1024, MAX_BLOCK):
            for dtype in ("*fp32", "*bf16"):
                signature = {"x_ptr": dtype, **outputs, "K": "i32:16"}
                warps = 4 if block <= 1024 else 8
                label = f"quantize rows {name} {dtype} {block}"
                cases.append((label, _row_kernel, signature, {**flags, "BLOCK": block}, warps, 3))
        signature = {"x_ptr": "*fp32", "q_ptr": "*i8", "low_ptr": "*fp32", "high_ptr": "*fp32", **outputs}
        signature |= {"n": "i32:16", "chunks": "i32"}
        constants = {**flags, "CHUNK": CHUNK, "BLOCK": MAX_BLOCK}
        cases.append((f"quantize tensor {name}", _chunk_kernel, signature, constants, 8, 3))
        for block, dtype in ((64, "*bf16"), (1024, "*fp32"), (4096, "*fp32"), (MAX_HELD, "*fp32")):
            signature = {"x_ptr": dtype, "out_ptr": dtype, "rows": "i32"}
            signature |= dict.fromkeys(("size1", "size2"), "i32")
            signature |= dict.fromkeys(("K", *(f"stride_{t}{i}" for t in "xo" for i in "012")), "i32:16")
            # An argument of 1 is compiled as a constant.
            constants = {**flags, "stride_xk": 1, "stride_ok": 1, "ROWS": _rows_held(block), "BLOCK": block}
            label = f"fake quantize {name} {dtype} {block}"
            cases.append((label, _fake_kernel, signature, constants, warps_holding(block), 3))
    signature = {"x_ptr": "*fp32", "low_ptr": "*fp32", "high_ptr": "*fp32", "n": "i32:16"}
    cases.append(("extrema", _extrema_kernel, signature, {"CHUNK": CHUNK, "BLOCK": MAX_BLOCK}, 8, 3))
    return cases


# ------------------------------------------------------------------------------------------------------------- CPU

CPU_CHUNK = 2**18  # values quantized at a time, so that the float32 intermediate stays in cache: 2.5x at [4096, 3072]


def outputs(x: torch.Tensor, symmetric: bool, scales: int) -> Quantized:
    """(codes, scale, zero point) to fill."""
    zero_point = x.new_empty(0 if symmetric else scales, dtype=torch.int32)
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty(scales, dtype=torch.float32), zero_point


def outputs_of_empty(x: torch.Tensor, symmetric: bool, scales: int) -> Quantized:
    """What an x without values gives: scale 0 and zero point 0."""
    q, scale, zero_point = outputs(x, symmetric, scales)
    return q, scale.zero_(), zero_point.zero_()


def _scale_and_zero_torch(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(scale, 1/scale or 0, zero point in float32 or None) of rows with the given extrema."""
    qmax = 2 ** (bits - 1) - 1
    magnitude = torch.maximum(high, -low)
    if symmetric:
        scale = magnitude / qmax
    else:
        scale = (high - low) / (2 * qmax + 1)
        flat = scale < (magnitude * FLAT).clamp_min_(TINY)
        scale = torch.where(flat, magnitude, scale)
    small = scale < TINY
    scale = scale.masked_fill_(small, 0.0)
    scale = scale + (scale - scale)  # infinity becomes NaN
    inverse = scale.reciprocal().masked_fill_(small, 0.0)
    return scale, inverse, None if symmetric else (-qmax - 1) - (low * inverse).round_()


def _codes(x: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor | None, bits: int, clamp: bool) -> torch.Tensor:
    """rint(x * inverse) + zero, still float32."""
    qmax = 2 ** (bits - 1) - 1
    q = (x * inverse).round_()
    if zero is not None:
        q.add_(zero)
    return q.clamp_(-qmax if zero is None else -qmax - 1, qmax) if clamp else q


def _rows_cpu(x: torch.Tensor, bits: int, symmetric: bool) -> Quantized:
    x = x.float()
    # amin and amax apart are three times faster than aminmax.
    scale, inverse, zero = _scale_and_zero_torch(x.amin(1), x.amax(1), bits, symmetric)
    scale, inverse, zero = stored(scale), stored(inverse), None if zero is None else stored(zero)
    # Symmetric codes need no clamp: |x| (1/scale) <= qmax (1 + 2^-22), which rounds to qmax. Asymmetric ones do: max
    # and min may both round away from each other.
    q = _codes(x, inverse.unsqueeze(1), None if zero is None else zero.unsqueeze(1), bits, not symmetric)
    return q.to(torch.int8), scale, _zero_point(scale, zero)


def per_token_cpu(x: torch.Tensor, bits: int, symmetric: bool) -> Quantized:
    if x.numel() == 0:
        return outputs_of_empty(x, symmetric, x.shape[0])
    x = x.contiguous()
    if native.available() and x.dtype != torch.float64:
        q, scale, zero_point = outputs(x, symmetric, x.shape[0])
        x = x.float()
        native.function("quantize")(
            x.data_ptr(), *x.shape, bits, q.data_ptr(), scale.data_ptr(), native.pointer(zero_point)
        )
        return q, scale, zero_point
    if x.numel() <= CPU_CHUNK:
        return _rows_cpu(x, bits, symmetric)
    parts = [_rows_cpu(rows, bits, symmetric) for rows in x.split(max(1, CPU_CHUNK // x.shape[1]))]
    q, scale, zero_point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return q, scale, zero_point


def _fake_rows_cpu(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale, inverse, zero = _scale_and_zero_torch(low, high, bits, symmetric)
    scale, inverse, zero = stored(scale), stored(inverse), None if zero is None else stored(zero)
    q = (wide * inverse).round_()
    if zero is not None:
        # clamp(q + zero) - zero; the lower end needs none, since low itself rounds to it
        q = torch.minimum(q, 2 ** (bits - 1) - 1 - zero)
    return q.mul_(scale).to(x.dtype)


def _fake_per_token_cpu(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    out = torch.empty_like(x)  # in x's strides: attention passes transposed views, which are not worth copying
    rows = max(1, CPU_CHUNK * x.shape[0] // max(1, x.numel()))
    for part, target in zip(x.split(rows), out.split(rows), strict=True):
        target.copy_(_fake_rows_cpu(part, bits, symmetric))
    return out


def _per_tensor_cpu(
    x: torch.Tensor, bits: int, symmetric: bool, scale: torch.Tensor | None, zero_point: torch.Tensor | None
) -> Quantized:
    if scale is not None:
        return _static(x, bits, symmetric, scale, zero_point)
    if x.numel() == 0:
        return outputs_of_empty(x, symmetric, 1)
    flat = x.contiguous().view(-1)
    low, high = flat.amin().reshape(1).float(), flat.amax().reshape(1).float()
    new_scale, inverse, zero = _scale_and_zero_torch(low, high, bits, symmetric)
    parts = [_codes(part.float(), inverse, zero, bits, not symmetric).to(torch.int8) for part in flat.split(CPU_CHUNK)]
    q = parts[0] if len(parts) == 1 else torch.cat(parts)
    return q.view(x.shape), new_scale, _zero_point(new_scale, zero)


def _zero_point(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return scale.new_zeros(0, dtype=torch.int32) if zero is None else zero.nan_to_num_(0.0).to(torch.int32)


def static_codes(x: torch.Tensor, bits: int, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """int8 codes of float32 x under a given scale [1]; values outside its range saturate, NaN becomes 0."""
    inverse = scale.reciprocal().masked_fill_(scale < TINY, 0.0)
    zero = None if zero_point is None else zero_point.float()
    return _codes(x, inverse, zero, bits, True).nan_to_num_(nan=0.0).to(torch.int8)


def _static(
    x: torch.Tensor, bits: int, symmetric: bool, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> Quantized:
    x = x.float().contiguous()
    poison = (x - x).sum()  # NaN if x holds NaN or infinity
    new_zero = scale.new_zeros(0, dtype=torch.int32) if zero_point is None else zero_point.clone()
    codes = static_codes(x, bits, scale, zero_point).reshape(x.shape)  # of a scalar x, the scale [1] makes a [1]
    return codes, scale + (scale - scale) + poison, new_zero


# -------------------------------------------------------------------------------------------------------------- ops


def _per_token_fake(x: torch.Tensor, bits: int, symmetric: bool) -> Quantized:
    return outputs(x, symmetric, x.shape[0])


def _per_tensor_fake(
    x: torch.Tensor, bits: int, symmetric: bool, scale: torch.Tensor | None, zero_point: torch.Tensor | None
) -> Quantized:
    return outputs(x, symmetric, 1)


_per_token = define(
    "quantize_per_token(Tensor x, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)",
    cpu=per_token_cpu,
    cuda=launch_per_token,
    fake=_per_token_fake,
)
_fake_per_token = define(
    "fake_quantize_per_token(Tensor x, int bits, bool symmetric) -> Tensor",
    cpu=_fake_per_token_cpu,
    cuda=launch_fake_per_token,
    fake=lambda x, bits, symmetric: torch.empty_like(x),
)
_per_tensor = define(
    "quantize_per_tensor(Tensor x, int bits, bool symmetric, Tensor? scale, Tensor? zero_point) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=_per_tensor_cpu,
    cuda=launch_per_tensor,
    fake=_per_tensor_fake,
)


def quantize_per_token(
    x: torch.Tensor, bits: int = 8, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row by its own range (formulas at the top of this file).

    Args:
        x: float [..., K].
        bits: 8 or 4; 4-bit codes are stored one to an int8.
        symmetric: without or with a zero point.

    Returns:
        codes int8 [..., K]; scale float32 [...]; zero_point int32 [...] or None. NaN or infinity in a row makes its
        scale NaN (codes and zero point are then arbitrary).

    Raises:
        TypeError, ValueError: not a float tensor, a scalar, or another number of bits.
    """
    check_tensor("x", x, FLOATS)
    check_choice("bits", bits, (8, 4))
    check_flag("symmetric", symmetric)
    if x.dim() == 0:
        raise ValueError("x is a scalar, expected [..., K]; use x.reshape(1, 1) or quantize_per_tensor")
    tokens = x.shape[:-1]
    rows = x.detach().reshape(math.prod(tokens), x.shape[-1])
    if traced_on_cpu(x, natively=x.dtype != torch.float64) and x.numel():
        q, scale, zero_point = _rows_cpu(rows, bits, symmetric)
    else:
        q, scale, zero_point = _per_token(rows, bits, symmetric)
    return q.reshape(x.shape), scale.reshape(tokens), None if symmetric else zero_point.reshape(tokens)


def fake_quantize_per_token(x: torch.Tensor, bits: int = 8, symmetric: bool = True) -> torch.Tensor:
    """`scale * (codes - zero_point)` of `quantize_per_token`, without storing codes; carries no gradient.

    Args:
        x: float [..., K].
        bits, symmetric: as `quantize_per_token`.

    Returns:
        like x.

    Raises:
        TypeError, ValueError: as `quantize_per_token`.
    """
    check_tensor("x", x, FLOATS)
    check_choice("bits", bits, (8, 4))
    check_flag("symmetric", symmetric)
    if x.dim() == 0:
        raise ValueError("x is a scalar, expected [..., K]")
    if not x.numel():
        return x.detach().clone()
    return (_fake_rows_cpu if traced_on_cpu(x) else _fake_per_token)(x.detach(), bits, symmetric)


def quantize_per_tensor(
    x: torch.Tensor,
    bits: int = 8,
    symmetric: bool = True,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize a whole tensor by one range (the published mode), or by a given static scale.

    Args:
        x: float [...].
        bits, symmetric: as `quantize_per_token`.
        scale: float32 [1]; static when given (values outside its range saturate), else from x's extrema.
        zero_point: int32 [1], with a given scale and `symmetric=False`.

    Returns:
        codes int8 like x; scale float32 [1]; zero_point int32 [1] or None. NaN or infinity in x makes the scale NaN.

    Raises:
        TypeError, ValueError: as `quantize_per_token`; a scale that is not [1], a zero point missing or unneeded.
    """
    check_tensor("x", x, FLOATS)
    check_choice("bits", bits, (8, 4))
    check_flag("symmetric", symmetric)
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point without scale: pass both for static quantization, or neither")
    else:
        check_tensor("scale", scale, (torch.float32,))
        if zero_point is not None:
            check_tensor("zero_point", zero_point, (torch.int32,))
        check_device(x=x, scale=scale, zero_point=zero_point)
        one = [tensor.shape == (1,) for tensor in (scale, zero_point) if tensor is not None]
        if not all(one) or (zero_point is None) != symmetric:
            raise ValueError(
                "static quantization takes scale [1] and, with symmetric=False only, zero_point [1]; got scale "
                f"{tuple(scale.shape)}, symmetric={symmetric}, zero_point "
                f"{None if zero_point is None else tuple(zero_point.shape)}"
            )
    q, new_scale, new_zero = _per_tensor(x.detach(), bits, symmetric, scale, zero_point)
    return q, new_scale, None if symmetric else new_zero
