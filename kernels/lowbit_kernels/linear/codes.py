"""A linear on weight codes that are not packed yet: the forward pass of quantization-aware training."""

from __future__ import annotations

import math

import torch

from .._ops import check_device, define
from ..packing import UNIFORM_CODES, has_offset, launch_pack
from .cpu import codes_linear_cpu
from .gpu import launch


def _codes_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if layout in UNIFORM_CODES:
        own = "uniform8" if has_offset(layout) else "int8"
        return launch(x, codes.contiguous(), scale, bias, x_scale, x_zero_point, None, out_dtype, own)
    # Codes come from a quantizer, so their range needs no check, which would stall the device.
    packed, w_sum = launch_pack(codes, layout)
    return launch(x, packed, scale, bias, x_scale, x_zero_point, None, out_dtype, layout, w_sum=w_sum)


def _codes_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[-2], dtype=out_dtype)


_codes_op = define(
    "codes_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale, Tensor? x_zero_point, "
    "str layout, ScalarType out_dtype) -> Tensor",
    cpu=codes_linear_cpu,
    cuda=_codes_cuda,
    fake=_codes_fake,
)


def codes_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same product from unpacked codes, bit for bit: what quantization-aware training runs forward.

    Args:
        x: int8 [..., K].
        codes: int8 [N, K]; [2, N, K] for layout "split".
        scale, bias, x_scale, x_zero_point, out_dtype: as `ternary_linear`.
        layout: as in `packing.CODES_IN_A_BYTE`.

    Returns:
        [..., N].

    Raises:
        ValueError: another K than the codes have, or different devices. What else fits, the quantizers see to.
    """
    check_device(x=x, codes=codes, scale=scale, bias=bias)
    if x.shape[-1] != codes.shape[-1]:  # the native kernels would read past the end of the codes
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {codes.shape[-1]}]")
    zero = None if x_zero_point is None else x_zero_point.reshape(-1)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _codes_op(rows, codes, scale, bias, x_scale.reshape(-1), zero, layout, out_dtype)
    return y.reshape(*x.shape[:-1], codes.shape[-2])
