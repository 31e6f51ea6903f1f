"""The CPU path of the linears: the native kernels, or packed codes expanded to int8 and multiplied by oneDNN.

The latter where there are no native kernels, and in exported programs. torch has no 2-bit product on CPUs. Unpacking
by its operations costs more than the int8 product itself below a few hundred rows, so the int8 expansion is kept beside
the packed tensor it was made from, for as long as that tensor lives.

Under torch.compile only that product stays an opaque op: the epilogue is traced, so that Inductor fuses it with what
follows (residual, LayerNorm, GELU, the next quantization).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import native
from .._derived import Derived
from .._ops import define, stored, traced_on_cpu
from ..packing import has_offset, unpacked
from . import native as linear_native
from .native import row_scale


@dataclass
class Expanded:
    """Signed int8 codes [N, K] (a split pair stacked to [2N, K]), prepacked by oneDNN where it can be.

    Where oneDNN's products of large codes are not exact (`_saturates`), they are twice those of `weight` and once those
    of `odd`.
    """

    K: int
    rows: int
    weight: torch.Tensor
    scale: torch.Tensor  # float32 [rows]
    row_sum: torch.Tensor  # float32 [rows]
    prepacked: bool
    offset: torch.Tensor | None = None  # float32 [rows]
    odd: torch.Tensor | None = None


_kept = Derived()

_keep = True


def keep_expanded(keep: bool) -> None:
    """Whether torch's int8 products keep int8 expansions of packed weights (default: True).

    Without, weights stay at 1 or 2 bits in memory and are unpacked in every call. Turning it off frees what is kept.
    Native CPU kernels read packed weights as they are and keep no expansion either way.
    In-place edits of a packed tensor are noticed, except through `.data` or a NumPy view, which have no version.
    """
    global _keep
    _keep = keep
    if not keep:
        _kept.clear()


def expanded_bytes() -> int:
    """Bytes of int8 expansions that are kept now; 0 where native CPU kernels run."""
    return sum(expanded.rows * expanded.K for expanded in _kept.values())


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


def expand(packed: Sequence[torch.Tensor], scale: Sequence[torch.Tensor], K: int, layout: str) -> Expanded:
    """The expansion of packed weights that share their input; kept, unless `keep_expanded(False)`."""

    def make() -> Expanded:
        return expand_codes(*joint_codes(packed, scale, K, layout))

    return _kept.get([*packed, *scale], (K, layout), make) if _keep else make()


def expand_codes(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> Expanded:
    """Expansion of int8 codes [rows, K] with one scale, and maybe one offset, a row."""
    rows, K = codes.shape
    row_sum = codes.sum(1, dtype=torch.int32).float()
    most = max((abs(int(extreme)) for extreme in codes.aminmax()), default=0) if codes.numel() else 0
    if most > 63 and _saturates():  # halves are -64 to 63: two products of theirs and of bytes fit into 16 bits
        odd = (codes & 1).contiguous()
        return Expanded(K, rows, ((codes - odd) >> 1).contiguous(), scale, row_sum, False, offset, odd)
    # oneDNN adds in int32, with x + 128 in the place of x, and returns float32: sums of small codes, which stay below
    # 2^24, as they are, of others rounded once, as every epilogue rounds them.
    limit = 2**24 // 128 if most <= 1 else 2**31 // (255 * most)
    prepacked = _has_onednn() and codes.numel() > 0 and limit > K
    weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None) if prepacked else codes.contiguous()
    return Expanded(K, rows, weight, scale, row_sum, prepacked, offset)


@functools.cache
def _saturates() -> bool:
    """Whether torch's int8 products are wrong for large codes, as oneDNN's are on processors without VNNI.

    There two products are added in 16 bits.
    """
    x, w = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 48), -128, dtype=torch.int8)
    return bool((torch._int_mm(x, w) != -127 * 128 * 64).any())


def joint_codes(
    packed: Sequence[torch.Tensor], scale: Sequence[torch.Tensor], K: int, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [rows, K] of several packed linears one below the other, the scale of each row, and the offset."""
    codes = torch.cat([unpacked(tensor, K, layout).flatten(0, -2) for tensor in packed])
    scales = [row_scale(own, tensor.shape[0]) for own, tensor in zip(scale, packed, strict=True)]
    if not has_offset(layout):
        return codes, torch.cat(scales), None
    steps, offsets = zip(*(own.chunk(2) for own in scales), strict=True)
    return codes, torch.cat(steps), torch.cat(offsets)


@functools.lru_cache(maxsize=64)
def _ones_zeros(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(n), torch.zeros(n, dtype=torch.int64)


def accumulate(x: torch.Tensor, expanded: Expanded, scaled: bool = False) -> torch.Tensor:
    """x int8 [M, K] times the expanded codes -> float32 [M, rows]: exact integers, or times the scales of the rows."""
    if not expanded.prepacked or x.shape[0] == 0:
        acc = _int_mm(x, expanded.weight) if x.shape[0] else x.new_zeros(0, expanded.rows)
        acc = acc if expanded.odd is None or not x.shape[0] else acc.mul_(2).add_(_int_mm(x, expanded.odd))
        return acc.float().mul_(expanded.scale) if scaled else acc.float()
    ones, zeros = _ones_zeros(expanded.rows)
    scale = expanded.scale if scaled else ones
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, expanded.weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _int_mm(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N]."""
    if codes.shape[0] == 0 or codes.shape[1] < 2:  # `_int_mm` on CPU refuses empty operands and errs at K = 1
        return x.int() @ codes.int().t()
    return torch._int_mm(x, codes.t())


def linears_cpu(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> torch.Tensor:
    """Linears on one input: one product, one epilogue, results side by side [M, sum N]."""
    if not torch.compiler.is_compiling() and native.available():
        weights = linear_native.Weights.packed(
            packed, scale, bias, [layout] * len(packed), x.shape[1], x_zero_point is not None
        )
        y = linear_native.linears(x, x_scale, x_zero_point, weights)
        return _activated(y, activation, out_dtype).to(out_dtype)
    scaled = scaled_op if traced_on_cpu(x) else _scaled
    y = scaled(x, packed, scale, x_zero_point, layout)
    sizes = [tensor.shape[0] for tensor in packed]
    if layout == "split":
        parts = y.split([2 * N for N in sizes], 1)
        y = torch.cat([part[:, :N] + part[:, N:] for part, N in zip(parts, sizes, strict=True)], 1)
    return _finish(y, joint_bias(bias, sizes, x.device), x_scale, activation, out_dtype)


def dynamic_linears_cpu(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    bits: int,
    symmetric: bool,
    activation: str | None,
    layout: str,
) -> torch.Tensor:
    """The same of x float32 [M, K], quantized token by token; by the native kernels only."""
    weights = linear_native.Weights.packed(packed, scale, bias, [layout] * len(packed), x.shape[1], not symmetric)
    return _activated(linear_native.dynamic_linears(x, bits, symmetric, weights), activation, torch.float32)


def joint_bias(bias: Sequence[torch.Tensor | None], sizes: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Biases of several linears one after the other, zeros for one without; None where none has one."""
    if len(bias) == 1 or all(own is None for own in bias):
        return bias[0]
    pairs = zip(bias, sizes, strict=True)
    return torch.cat([torch.zeros(N, device=device) if own is None else own.float() for own, N in pairs])


def codes_linear_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`linears_cpu` for one linear given by its codes int8 [N, K] or [2, N, K]."""
    if native.available():
        weights = linear_native.Weights.codes(codes, scale, bias, layout, x_zero_point is not None)
        return linear_native.linears(x, x_scale, x_zero_point, weights).to(out_dtype)
    rows, scale, offset = math.prod(codes.shape[:-1]), row_scale(scale, codes.shape[-2]), None
    if has_offset(layout):
        scale, offset = scale.chunk(2)
    expanded = expand_codes(codes.reshape(rows, x.shape[1]), scale, offset)
    y = _product(x, expanded, x_zero_point)
    y = y[:, : y.shape[1] // 2] + y[:, y.shape[1] // 2 :] if layout == "split" else y
    return _finish(y, bias, x_scale, None, out_dtype)


def _planes(layout: str) -> int:
    return 2 if layout == "split" else 1


def _product(x: torch.Tensor, expanded: Expanded, x_zero_point: torch.Tensor | None) -> torch.Tensor:
    """scale[n] * sum_k (x[m, k] - x_zero_point[m]) * w[n, k] -> float32 [M, rows]."""
    x = x.contiguous()
    if x_zero_point is None:
        y = accumulate(x, expanded, scaled=True)
    else:
        y = accumulate(x, expanded)
        y = y.addcmul_(x_zero_point.float().unsqueeze(-1), expanded.row_sum, value=-1).mul_(expanded.scale)
    return y if expanded.offset is None else y.addr_(sum_of_values(x, x_zero_point), expanded.offset)


def sum_of_values(x: torch.Tensor, x_zero_point: torch.Tensor | None) -> torch.Tensor:
    """sum_k (x[m, k] - x_zero_point[m]) -> float32 [M]: what an offset of the weights is multiplied with."""
    total = x.sum(1, dtype=torch.int32).float()
    return total if x_zero_point is None else total - x.shape[1] * x_zero_point.float()


def _scaled(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    x_zero_point: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    return _product(x, expand(packed, scale, x.shape[1], layout), x_zero_point)


def _scaled_fake(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    x_zero_point: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    rows = sum(tensor.shape[0] for tensor in packed) * _planes(layout)
    return x.new_empty(x.shape[0], rows, dtype=torch.float32)


# What torch.compile cannot look into: oneDNN's weights have no strides.
scaled_op = define(
    "cpu_product(Tensor x, Tensor[] packed, Tensor[] scale, Tensor? x_zero_point, str layout) -> Tensor",
    cpu=_scaled,
    fake=_scaled_fake,
)


def _finish(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Scale of the tokens, bias, activation, in float32; the activation of what a linear on its own would return."""
    # Every pass over [M, N] counts, hence the fused multiply and add.
    x_scale = x_scale.unsqueeze(-1)
    y = y * x_scale if bias is None else torch.addcmul(bias.float(), y, x_scale)
    return _activated(y, activation, out_dtype).to(out_dtype)


def _activated(y: torch.Tensor, activation: str | None, out_dtype: torch.dtype) -> torch.Tensor:
    if activation is None:
        return y
    y = y.to(out_dtype).float()
    return stored(torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none"))
