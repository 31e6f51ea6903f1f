"""Residual addition, LayerNorm and, on request, quantization of the result in one pass over each row.

    v = x + residual
    y = (v - mean(v)) / sqrt(var(v) + eps) * weight + bias        (Ba et al. 2016; var divides by K)
    codes, scale, zero_point = quantize_per_token(y)              formulas in quantize.py

Arithmetic is float32; y is rounded once, to x's dtype, and the codes are those of the rounded y: a model that quantizes
in a separate step gets the same ones. The GPU and the CPU sum in different orders, so their y may differ in the last
place. Bound by memory: on a GPU one read of x and the residual, one write of y and of a byte a value for the codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from . import native
from ._ops import FLOATS, SINGLE, check_choice, check_device, check_flag, check_tensor, define, traced_on_cpu
from ._triton import tl, triton
from .quantize import Quantized, outputs, per_token_cpu, quantize_per_token, quantize_row

Normalized = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # y, codes, scale, zero point

# ---------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def normalize_row(
    v, row, k, mask, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, zero_ptr, K, eps,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Normalize the float32 row `v` (`mask` marks its columns `k`); store it and, unless BITS is 0, its codes."""
    mean = tl.sum(tl.where(mask, v, 0.0), axis=0) / K
    centred = tl.where(mask, v - mean, 0.0)
    # From the centred values: the difference of sums of squares would cancel.
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / K + eps)
    weight = tl.load(weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + k, mask=mask, other=0.0).to(tl.float32)
    y = (centred * inverse_deviation * weight + bias).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * K + k, y, mask=mask)
    if BITS:
        y = y.to(tl.float32)
        quantize_row(y, mask, k, q_ptr + row * K, scale_ptr + row, zero_ptr + row, BITS, SYMMETRIC)


@triton.jit
def _add_layernorm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, zero_ptr, K, eps,
    HAS_RESIDUAL: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, which stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    v = tl.load(x_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
    normalize_row(
        v, row, k, mask, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, zero_ptr, K, eps, BITS, SYMMETRIC
    )  # fmt: skip


MAX_K = 8192  # values held in registers by one program of 8 warps, 32 a thread


def row_tile(K: int) -> dict[str, Any]:
    """BLOCK and launch options of a kernel that holds a row of K values.

    Raises:
        ValueError: a row too long for registers.
    """
    if K > MAX_K:
        raise ValueError(f"rows of K={K} values, accepted on CUDA: up to {MAX_K}")
    block = triton.next_power_of_2(K)
    # Without fusion to FMA, every kernel that normalizes rounds alike, whatever stands before the addition.
    return {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8, "enable_fp_fusion": False}


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bits: int,
    symmetric: bool,
) -> Normalized:
    """Run the Triton kernel; arguments as the op's, already validated."""
    tile = row_tile(x.shape[1])
    x = x.contiguous()
    if not x.numel():
        return with_codes(x.clone(), bits, symmetric)
    y = torch.empty_like(x)
    codes = code_outputs(y, bits, symmetric)
    _add_layernorm_kernel[(x.shape[0],)](
        x, x if residual is None else residual.contiguous(), weight.contiguous(), bias.contiguous(),
        y, *codes, x.shape[1], eps,
        HAS_RESIDUAL=residual is not None, BITS=bits, SYMMETRIC=symmetric, **tile,
    )  # fmt: skip
    return y, *codes


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    cases = []
    outputs = {"q_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32", "K": "i32:16", "eps": "fp32"}
    for K in (1024, MAX_K):  # the code for 1024 also serves 768: K is no constant
        tile = row_tile(K)
        for dtype in ("*fp32", "*bf16"):
            for bits, symmetric in ((0, True), (8, True), (8, False)):
                pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr"), dtype)
                constants = {"HAS_RESIDUAL": True, "BITS": bits, "SYMMETRIC": symmetric, "BLOCK": tile["BLOCK"]}
                constants["enable_fp_fusion"] = tile["enable_fp_fusion"]
                name = "" if not bits else " symmetric" if symmetric else " asymmetric"
                label = f"add_layernorm{name} {dtype} {tile['BLOCK']}"
                cases.append((label, _add_layernorm_kernel, pointers | outputs, constants, tile["num_warps"], 3))
    return cases


# ------------------------------------------------------------------------------------------------------------- CPU


def layernorm(
    v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """LayerNorm in float32 by torch's own kernel, rounded once to `dtype`."""
    return functional.layer_norm(v.float(), weight.shape, weight.float(), bias.float(), eps).to(dtype)


def code_outputs(y: torch.Tensor, bits: int, symmetric: bool) -> Quantized:
    """What takes the codes of y [M, K]: without elements when `bits` is 0."""
    return outputs(y, symmetric, y.shape[0]) if bits else outputs(y.new_empty(0), True, 0)


def with_codes(y: torch.Tensor, bits: int, symmetric: bool) -> Normalized:
    """y [M, K] and its codes."""
    return y, *(per_token_cpu(y, bits, symmetric) if bits else code_outputs(y, 0, symmetric))


def _sum(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return x if residual is None else x.float() + residual.float()


def add_layernorm_cpu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bits: int,
    symmetric: bool,
) -> Normalized:
    if native.available() and x.numel() and x.dtype == torch.float32:
        x, weight, bias = x.contiguous(), weight.float().contiguous(), bias.float().contiguous()
        residual = None if residual is None else residual.contiguous()
        y = torch.empty_like(x)
        codes = code_outputs(y, bits, symmetric)
        native.function("add_layernorm")(
            x.data_ptr(), native.pointer(residual), *x.shape, native.norm(weight, bias, eps), bits,
            y.data_ptr(), *map(native.pointer, codes),
        )  # fmt: skip
        return y, *codes
    return with_codes(layernorm(_sum(x, residual), weight, bias, eps, x.dtype), bits, symmetric)


def traceable(x: torch.Tensor, natively: bool, dtype: torch.dtype, bits: int | None) -> bool:
    """Whether to run as `traced`: not where codes are of a y in half precision, whose rounding Inductor would skip."""
    return traced_on_cpu(x, natively) and (bits is None or dtype == torch.float32)


def traced(
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bits: int | None,
    symmetric: bool,
    dtype: torch.dtype,
) -> Any:
    """Plain torch code of what the public functions return, for Inductor to fuse on the CPU."""
    y = layernorm(v, weight, bias, eps, dtype)
    return y if bits is None else (y, *quantize_per_token(y, bits, symmetric))


# -------------------------------------------------------------------------------------------------------------- op


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
