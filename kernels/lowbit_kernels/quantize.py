"""Activation quantization: float [M, K] -> int8 codes, float32 scale, int32 zero point.

    symmetric    scale = max|x| / qmax                    q = rint(x * (1/scale)),       qmax = 2^(bits-1) - 1
    asymmetric   scale = (max - min) / (2^bits - 1)       q = clamp(rint(x * (1/scale)) + zero_point, qlo, qhi)
                 zero_point = qlo - rint(min * (1/scale)) x ~ scale * (q - zero_point)

(TernaryBERT section 3.1 min-max, with an integer zero point so that integer products can subtract it.) Arithmetic is
float32, rounding half to even, the reciprocal correctly rounded: CPU and GPU give the same bytes. A constant row
keeps its value, a row of zeros stays zero, NaN or infinity in a row makes its scale NaN. Moves 4MK + MK bytes.
"""

from __future__ import annotations

import torch

from ._ops import FLOATS, check_choice, check_device, check_tensor, define
from ._triton import tl, triton

# Scales below this have no float32 reciprocal: such a row is treated as zeros (symmetric) or constant (asymmetric).
TINY = 2.0**-126

# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _rint(x):
    """Round half to even. Adding 1.5 * 2^23 leaves no fraction bits; larger values are integers already."""
    magic = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)


@triton.jit
def _scale_and_zero(low, high, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(scale, 1/scale, zero point) of rows with extrema low and high; the one definition for both modes."""
    if SYMMETRIC:
        spread = tl.maximum(high, -low)
        scale = tl.div_rn(spread, tl.full(spread.shape, QMAX, tl.float32))
        inverse = tl.where(scale < 1.1754943508222875e-38, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
        zero = tl.zeros(scale.shape, tl.float32)
    else:
        scale = tl.div_rn(high - low, tl.full(low.shape, 2 * QMAX + 1, tl.float32))
        magnitude = tl.maximum(tl.abs(low), tl.abs(high))
        flat = (scale < 1.1754943508222875e-38) | (scale * 1073741824.0 < magnitude)
        scale = tl.where(flat, tl.where(magnitude < 1.1754943508222875e-38, 1.0, magnitude), scale)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        zero = -QMAX - 1.0 - _rint(low * inverse)
    return scale, inverse, zero


@triton.jit
def _quantize_row_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, K, stride_xm, stride_qm,
    QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a row, the row in registers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
    # NaN and infinity poison the scale through x - x, which maximum alone may drop.
    poison = tl.sum(tl.where(k < K, x - x, 0.0), axis=0)
    high = tl.max(tl.where(k < K, x, float("-inf")), axis=0)
    low = tl.min(tl.where(k < K, x, float("inf")), axis=0)
    # Shape [1], since div_rn takes tensors only.
    zeros = tl.zeros((1,), tl.float32)
    scale, inverse, zero = _scale_and_zero(zeros + low, zeros + high, QMAX, SYMMETRIC)
    q = _rint(x * tl.sum(inverse, axis=0)) + tl.sum(zero, axis=0)
    q = tl.minimum(tl.maximum(q, -QMAX if SYMMETRIC else -QMAX - 1), QMAX)
    q = tl.where(poison == 0.0, q, 0.0)
    tl.store(q_ptr + row * stride_qm + k, q.to(tl.int8), mask=k < K)
    one = tl.arange(0, 1)
    tl.store(scale_ptr + row + one, scale + poison)
    if not SYMMETRIC:
        tl.store(zero_ptr + row + one, tl.where(poison == 0.0, zero, 0.0).to(tl.int32))


def launch(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the Triton kernel on float [M, K]; the zero point is empty when symmetric."""
    M, K = x.shape
    x = x.contiguous()
    q, scale, zero_point = _empty(x, symmetric)
    if M and K:
        block = triton.next_power_of_2(K)
        _quantize_row_kernel[(M,)](
            x, q, scale, zero_point, K, x.stride(0), q.stride(0),
            QMAX=2 ** (bits - 1) - 1, SYMMETRIC=symmetric, BLOCK_K=block, num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return q, scale, zero_point


# ------------------------------------------------------------------------------------------------------------- CPU


def _empty(x: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs for x [M, K]; without columns there is nothing to scale, and scale 0 says so."""
    M = x.shape[0]
    zero_point = x.new_zeros(0 if symmetric else M, dtype=torch.int32)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_zeros(M, dtype=torch.float32), zero_point


def _quantize_cpu(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.numel() == 0:
        return _empty(x, symmetric)
    x = x.float()
    qmax = 2 ** (bits - 1) - 1
    # amin and amax apart are three times faster than aminmax.
    if symmetric:
        scale = x.abs().amax(1) / qmax
        inverse = torch.where(scale < TINY, 0.0, 1 / scale)
        zero_point = scale.new_zeros(0)
    else:
        low, high = x.amin(1), x.amax(1)
        scale, inverse, zero_point = _affine(low, high, qmax)
    # A row with NaN or infinity: extrema are NaN or infinite, and so must the scale say.
    poison = scale - scale
    finite = bool((poison == 0).all())
    q = (x * inverse.unsqueeze(1)).round_()
    if symmetric:
        q.clamp_(-qmax, qmax) if not finite else None
    else:
        q.add_(zero_point.unsqueeze(1)).clamp_(-qmax - 1, qmax)
    if not finite:
        scale = scale + poison
        q = torch.where((poison == 0).unsqueeze(1), q, 0.0)
        zero_point = torch.where(poison == 0, zero_point, 0.0) if not symmetric else zero_point
    return q.to(torch.int8), scale, zero_point.to(torch.int32)


def _affine(low: torch.Tensor, high: torch.Tensor, qmax: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = (high - low) / (2 * qmax + 1)
    magnitude = torch.maximum(low.abs(), high.abs())
    # A range this far below the values' size is constant in float32, and would overflow the int32 zero point.
    flat = (scale < TINY) | (scale * 2**30 < magnitude)
    if bool(flat.any()):
        scale = torch.where(flat, torch.where(magnitude < TINY, 1.0, magnitude), scale)
    inverse = 1 / scale
    return scale, inverse, -qmax - 1 - torch.round(low * inverse)


# -------------------------------------------------------------------------------------------------------------- ops


def _fake(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty(x, symmetric)


_op = define(
    "quantize_per_token(Tensor x, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)",
    cpu=_quantize_cpu,
    cuda=launch,
    fake=_fake,
)


def _check(x: torch.Tensor, bits: int) -> None:
    check_tensor("x", x, FLOATS)
    check_choice("bits", bits, (8, 4))


def quantize_per_token(
    x: torch.Tensor, bits: int = 8, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row by its own range.

    Args:
        x: float [..., K].
        bits: 8 or 4; 4-bit codes are stored one to an int8.
        symmetric: without or with a zero point.

    Returns:
        codes int8 [..., K]; scale float32 [...]; zero_point int32 [...] or None. x ~ scale * (codes - zero_point).

    Raises:
        TypeError, ValueError: not a float tensor, a scalar, or another number of bits.
    """
    _check(x, bits)
    if x.dim() == 0:
        raise ValueError("x is a scalar, expected [..., K]")
    rows = x.shape[:-1]
    q, scale, zero_point = _op(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(rows.numel(), x.shape[-1]), bits, symmetric)
    return q.reshape(x.shape), scale.reshape(rows), None if symmetric else zero_point.reshape(rows)


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
        scale: float32 [1]; static when given, else from x's extrema.
        zero_point: int32 [1], with a given scale and `symmetric=False`.

    Returns:
        codes int8 like x; scale float32 [1]; zero_point int32 [1] or None.

    Raises:
        TypeError, ValueError: as `quantize_per_token`; a scale that is not [1], a zero point missing or unneeded.
    """
    _check(x, bits)
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point without scale: pass both for static quantization, or neither")
        q, scale, zero_point = _op(x.reshape(1, -1), bits, symmetric)
        return q.reshape(x.shape), scale, None if symmetric else zero_point
    check_tensor("scale", scale, (torch.float32,), ndim=1)
    check_device(x=x, scale=scale, zero_point=zero_point)
    if scale.shape != (1,) or (zero_point is None) != symmetric:
        raise ValueError(
            f"static quantization takes scale [1] and, unless symmetric, zero_point [1]; got scale "
            f"{tuple(scale.shape)}, symmetric={symmetric}, zero_point {'missing' if zero_point is None else 'given'}"
        )
    qmax = 2 ** (bits - 1) - 1
    q = torch.round(x.float() * (1 / scale))
    if zero_point is not None:
        check_tensor("zero_point", zero_point, (torch.int32,), ndim=1)
        q = q + zero_point
    return q.clamp(-qmax if symmetric else -qmax - 1, qmax).to(torch.int8), scale, zero_point
