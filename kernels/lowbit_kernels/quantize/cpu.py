"""`quantize`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .. import native
from .._ops import stored
from .shared import FLAT, TINY, Quantized

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
