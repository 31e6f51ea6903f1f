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

from .._ops import FLOATS, check_choice, check_device, check_flag, check_tensor, define, traced_on_cpu
from .cpu import _fake_per_token_cpu, _fake_rows_cpu, _per_tensor_cpu, _rows_cpu, outputs, per_token_cpu
from .gpu import launch_fake_per_token, launch_per_tensor, launch_per_token
from .shared import Quantized


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
