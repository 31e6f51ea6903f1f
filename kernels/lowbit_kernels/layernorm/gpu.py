"""`layernorm`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

from typing import Any

import torch

from .._triton import tl, triton
from ..quantize.gpu import quantize_row
from .cpu import code_outputs, with_codes
from .shared import Normalized


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
