"""Linears on evenly spaced levels on the GPU: codes expanded to int8, kept beside the packed ones, and torch's product.

Nothing here is written in Triton: cuBLAS multiplies int8 by int8 as fast as the device can.
"""

from __future__ import annotations

import torch

from .._derived import Derived
from ..packing import has_offset, unpacked
from ..quantize.cpu import static_codes
from .native import row_scale

expanded_codes = Derived()


def launch_uniform(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
    *,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`launch` for the layouts of `packing.UNIFORM_CODES`; arguments as the op's, already validated."""
    (M, K), N = x.shape, packed.shape[0]
    codes, sums = expanded_codes.get([packed], (K, layout), lambda: _expanded(packed, K, layout))
    acc = _int_mm(x, codes)[:M, :N].float()
    if x_zero_point is not None:
        acc -= x_zero_point.float().unsqueeze(-1) * sums
    flat = row_scale(scale, N)
    acc *= flat[:N]
    if has_offset(layout):
        total = x.sum(1, dtype=torch.int32).float()
        total = total if x_zero_point is None else total - K * x_zero_point.float()
        acc.addr_(total, flat[N:])
    y = acc * x_scale.unsqueeze(-1)
    y = y if bias is None else y + bias.float()
    if activation is not None:
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = y if residual is None else y + residual.float()
    return y.to(out_dtype) if out_scale is None else static_codes(y, 8, out_scale, None)


def _expanded(packed: torch.Tensor, K: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 with N and K filled up to what cuBLAS takes, multiples of 16, by zeros; the sum of each row."""
    codes = unpacked(packed, K, layout)
    return _filled(codes, -codes.shape[0] % 16), codes.sum(1, dtype=torch.int32).float()


def _filled(codes: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16, 0, rows)).contiguous()


def _int_mm(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] x int8 [N, K'] -> int32, with more rows where M is less than cuBLAS takes (17)."""
    return torch._int_mm(_filled(x, max(32 - x.shape[0], 0)), codes.t())
