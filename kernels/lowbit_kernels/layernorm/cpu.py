"""`layernorm`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .. import native
from .._ops import traced_on_cpu
from ..quantize.cpu import outputs, per_token_cpu
from ..quantize.op import quantize_per_token
from ..quantize.shared import Quantized
from .shared import Normalized


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
