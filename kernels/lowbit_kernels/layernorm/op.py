"""Residual addition, LayerNorm and, on request, quantization of the result in one pass over each row.

    v = x + residual
    y = (v - mean(v)) / sqrt(var(v) + eps) * weight + bias        (Ba et al. 2016; var divides by K)
    codes, scale, zero_point = quantize_per_token(y)              formulas in quantize/op.py

Arithmetic is float32; y is rounded once, to x's dtype, and the codes are those of the rounded y: a model that quantizes
in a separate step gets the same ones. The GPU and the CPU sum in different orders, so their y may differ in the last
place. Bound by memory: on a GPU one read of x and the residual, one write of y and of a byte a value for the codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .._ops import FLOATS, SINGLE, check_choice, check_device, check_flag, check_tensor, define
from .cpu import _sum, add_layernorm_cpu, code_outputs, traceable, traced
from .gpu import launch
from .shared import Normalized


def fake_with_codes(y: torch.Tensor, bits: int, symmetric: bool) -> Normalized:
    """Fake implementation of what `with_codes` returns."""
    return y, *code_outputs(y, bits, symmetric)


_op = define(
    "add_layernorm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, int bits, bool symmetric) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=add_layernorm_cpu,
    cuda=launch,
    fake=lambda x, residual, weight, bias, eps, bits, symmetric: fake_with_codes(x.new_empty(x.shape), bits, symmetric),
)


def check_layernorm(
    K: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, bits: int | None, symmetric: bool
) -> None:
    """Raise TypeError or ValueError unless these fit rows of K values."""
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, FLOATS)
        if tuple(parameter.shape) != (K,):
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, expected ({K},)")
    if not isinstance(eps, int | float) or not 0 <= eps < 1e30:  # as float32
        raise ValueError(f"eps={eps!r}, accepted: numbers from 0 up")
    check_flag("symmetric", symmetric)
    check_choice("bits", bits, (None, 8, 4))


def shaped(result: Normalized, tokens: torch.Size, bits: int | None, symmetric: bool) -> Any:
    """What the public functions return, from the op's rows."""
    y, q, scale, zero_point = result
    y = y.reshape(*tokens, y.shape[-1])
    if bits is None:
        return y
    return y, q.reshape(y.shape), scale.reshape(tokens), None if symmetric else zero_point.reshape(tokens)


def add_layernorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-12,
    *,
    bits: int | None = None,
    symmetric: bool = True,
) -> Any:
    """LayerNorm(x + residual) over the last dimension, with the int8 codes of the result on request; no gradient.

    Args:
        x: float32, float16 or bfloat16 [..., K]; on CUDA K is at most 8192.
        residual: like x, or None.
        weight, bias: float [K].
        eps: added to the variance.
        bits: None, or 8 or 4 to quantize the result as `quantize_per_token` does.
        symmetric: without or with a zero point.

    Returns:
        y like x. With bits: (y, codes int8 [..., K], scale float32 [...], zero_point int32 [...] or None), where a row
        with NaN or infinity in y has scale NaN.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, naming the argument.
    """
    check_tensor("x", x, SINGLE)
    if x.dim() == 0:
        raise ValueError("x is a scalar, expected [..., K]")
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,))
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, expected that of x {tuple(x.shape)}")
        residual = residual.detach()
    tokens, K = x.shape[:-1], x.shape[-1]
    check_layernorm(K, weight, bias, eps, bits, symmetric)
    check_device(x=x, residual=residual, weight=weight, bias=bias)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if traceable(x, x.dtype == torch.float32, x.dtype, bits) and x.numel():
        return traced(_sum(x, residual), weight, bias, eps, bits, symmetric, x.dtype)
    rows = math.prod(tokens)
    residual = None if residual is None else residual.reshape(rows, K)
    result = _op(x.reshape(rows, K), residual, weight, bias, eps, bits or 0, symmetric)
    return shaped(result, tokens, bits, symmetric)
