"""Linears on packed weights: int8 activations [M, K] x codes [N, K] -> float [M, N].

    sum[m, n] = sum_k x[m, k] * w[n, k]                                          exact, int32
    acc[m, n] = sum[m, n] - x_zero_point[m] * sum_k w[n, k]                      float32 from here on
    y[m, n]   = act(x_scale[m] * scale[n] * acc[m, n] + bias[n])                 one rounding per factor
    split     y = act(x_scale[m] * (scale[0, n] * acc1[m, n] + scale[1, n] * acc2[m, n]) + bias[n])
    uniform   y = act(x_scale[m] * (scale[0, n] * acc[m, n] + scale[1, n] * x_sum[m]) + bias[n]),
              x_sum[m] = sum_k (x[m, k] - x_zero_point[m])
    then      y + residual[m, n], and with out_scale clamp(rint(y * (1/out_scale)), -127, 127) as int8

The ops, for `cpu.py` and `gpu.py` to run.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from .._ops import FLOATS, check_choice, check_device, check_tensor, define
from ..packing import UNIFORM_CODES, code_dtype, has_offset, row_bytes
from ..quantize.cpu import static_codes
from ..quantize.op import quantize_per_token
from .cpu import linears_cpu
from .gpu import ACTIVATIONS, LAYOUTS, launch


def _cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    *,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    layout: str,
) -> torch.Tensor:
    first = out_dtype if residual is None and out_scale is None else torch.float32
    y = linears_cpu(x, [packed], [scale], [bias], x_scale, x_zero_point, activation, first, layout)
    if residual is not None:
        y += residual.float()
    return y.to(out_dtype) if out_scale is None else static_codes(y, 8, out_scale, None)


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    *,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=out_dtype)


def _define(layout: str) -> Any:
    return define(
        f"{layout}_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor x_scale, Tensor? x_zero_point, "
        "str? activation, ScalarType out_dtype, *, Tensor? residual=None, Tensor? out_scale=None) -> Tensor",
        cpu=functools.partial(_cpu, layout=layout),
        cuda=functools.partial(launch, layout=layout),
        fake=_fake,
    )


_OPS = {layout: _define(layout) for layout in (*LAYOUTS, *UNIFORM_CODES)}


def _linear(
    layout: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> torch.Tensor:
    check_tensor("x", x, (torch.int8, *FLOATS))
    check_tensor("packed", packed, (code_dtype(layout),), ndim=2)
    pairs = layout == "split" or has_offset(layout)
    check_tensor("scale", scale, (torch.float32,), ndim=2 if pairs else 1)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    tensors = {"bias": bias, "x_scale": x_scale, "x_zero_point": x_zero_point}
    check_device(x=x, packed=packed, scale=scale, **tensors, residual=residual, out_scale=out_scale)
    if x.dim() == 0:
        raise ValueError("x is a scalar, expected [..., K]")
    if out_scale is not None:
        if out_dtype not in (None, torch.int8):
            raise ValueError(f"out_dtype={out_dtype} with out_scale, whose result is int8: pass one of them")
        out_dtype = torch.int8
    N, K = packed.shape[0], x.shape[-1]
    if packed.shape[1] != row_bytes(K, layout):
        raise ValueError(
            f"x has K={K} columns, which needs {row_bytes(K, layout)} packed bytes a row, got {packed.shape[1]}"
        )
    lead = (2,) if pairs else ()
    grouped = has_offset(layout) and scale.shape[0] == 2 and 1 <= scale.shape[1] <= N
    if tuple(scale.shape) not in ((*lead, N), (*lead, 1)) and not grouped:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {(*lead, N)} or {(*lead, 1)}")
    if layout in UNIFORM_CODES and K >= 2**16:
        raise ValueError(f"x has K={K} columns, sums of products of {layout} codes stay below 2^31 up to {2**16 - 1}")
    if bias is not None:
        check_tensor("bias", bias, FLOATS)
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({N},)")
    if x.dtype == torch.int8:
        if x_scale is None:
            raise ValueError("x is int8: pass its x_scale (float x is quantized per token by itself)")
        out_dtype = out_dtype or torch.float32
    else:
        if x_scale is not None or x_zero_point is not None:
            raise ValueError(f"x_scale and x_zero_point belong to int8 x, got {x.dtype} x")
        out_dtype = out_dtype or x.dtype
        x, x_scale, x_zero_point = quantize_per_token(x)
    tokens = x.shape[:-1]
    if residual is not None:
        check_tensor("residual", residual, FLOATS)
        if residual.shape != (*tokens, N):
            raise ValueError(f"residual has shape {tuple(residual.shape)}, expected {(*tokens, N)}")
        residual = residual.reshape(math.prod(tokens), N)
    if out_scale is None:
        check_choice("out_dtype", out_dtype, FLOATS)
    else:
        check_tensor("out_scale", out_scale, (torch.float32,))
        if out_scale.shape != (1,):
            raise ValueError(f"out_scale has shape {tuple(out_scale.shape)}, expected (1,)")
    check_tensor("x_scale", x_scale, (torch.float32,))
    if x_zero_point is not None:
        check_tensor("x_zero_point", x_zero_point, (torch.int32,))
        if x_zero_point.shape != x_scale.shape:
            raise ValueError(
                f"x_zero_point {tuple(x_zero_point.shape)} and x_scale {tuple(x_scale.shape)} must have one shape"
            )
        x_zero_point = x_zero_point.reshape(-1)
    if x_scale.shape not in (tokens, (1,)):
        raise ValueError(f"x_scale has shape {tuple(x_scale.shape)}, expected {tuple(tokens)} (per token) or (1,)")
    x, x_scale = x.reshape(math.prod(tokens), K), x_scale.reshape(-1)
    y = _OPS[layout](
        x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype, residual=residual, out_scale=out_scale
    )
    return y.reshape(*tokens, N)


def ternary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear on ternary weights (W2A8).

    Args:
        x: int8 [..., K] with `x_scale`, used as it is; or float [..., K], quantized per token to symmetric int8 first.
        packed: uint8 [N, ceil(K/128)*32] from `pack_ternary`.
        scale: float32 [N] or [1].
        bias: float [N] or None.
        x_scale: float32, one per token ([...]) or [1].
        x_zero_point: int32 like `x_scale`, or None for symmetric activations.
        activation: None, "gelu" (erf) or "gelu_tanh", applied after the bias.
        out_dtype: float dtype of the result; default x's, or float32 for int8 x.
        residual: float [..., N], added after the activation, in float32.
        out_scale: float32 [1]; the result is then the int8 codes of `quantize_per_tensor` with this scale.

    Returns:
        [..., N]. NaN marks tokens with a NaN scale; int8 has no NaN: there they are 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, naming the argument.
    """
    return _linear("ternary", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def binary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear on binary weights (W1A8); as `ternary_linear`, with packed uint8 [N, ceil(K/256)*32] of `pack_binary`."""
    return _linear("binary", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def split_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear on a split pair of binary weights, exact two-accumulator form.

    As `ternary_linear`, with packed uint8 [N, ceil(K/128)*32] of `pack_split` and scale float32 [2, N] or [2, 1]
    (Bai et al. 2021, eq. 8).
    """
    return _linear("split", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear on symmetric int8 weights (W8A8); as `ternary_linear`, with codes int8 [N, K], K below 2^16."""
    return _linear("int8", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def uniform_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear on evenly spaced weights between a least and a largest one (Shen et al. 2020, Q-BERT).

    As `ternary_linear`, with packed codes of `pack_uniform(codes, f"uniform{bits}")`, K below 2^16, and

        scale: float32 [2, G], steps and offsets of G groups of consecutive rows (row n is of group floor(n G / N)):
            a code w stands for scale[0] * w + scale[1].
        bits: 2, 4 or 8.
    """
    check_choice("bits", bits, (2, 4, 8))
    rest = bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale
    return _linear(f"uniform{bits}", x, packed, scale, *rest)
