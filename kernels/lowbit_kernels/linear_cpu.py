"""The CPU path of the linears: packed codes expanded to int8, multiplied by oneDNN's int8 matrix product.

torch has no 2-bit product on CPUs. Unpacking costs more than the int8 product itself below a few hundred rows, so the
int8 expansion is kept beside the packed tensor it was made from, for as long as that tensor lives.

Under torch.compile only the product stays an opaque op: the epilogue is traced, so that Inductor fuses it with what
follows (residual, LayerNorm, GELU, the next quantization).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ._ops import define
from .packing import unpack_binary, unpack_split, unpack_ternary


@dataclass
class Expanded:
    """Signed int8 codes [N, K] (a split pair stacked to [2N, K]), prepacked by oneDNN where it can be."""

    made_from: tuple[object, ...]  # what the packed tensor was then
    K: int
    rows: int
    weight: torch.Tensor
    row_sum: torch.Tensor  # float32 [rows], exact
    prepacked: bool


_kept = WeakTensorKeyDictionary()
_keep = True


def keep_expanded(keep: bool) -> None:
    """Whether the CPU path keeps int8 expansions of packed weights (default: True).

    Without, weights stay at 1 or 2 bits in memory and are unpacked in every call. Turning it off frees what is kept.
    In-place edits of a packed tensor are noticed, except through `.data` or a NumPy view, which have no version.
    """
    global _keep
    _keep = keep
    if not keep:
        _kept.clear()


def expanded_bytes() -> int:
    """Bytes of int8 expansions that the CPU path keeps now."""
    return sum(entry.rows * entry.K for entry in _kept.values())


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


def _codes(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    if layout == "split":
        return torch.cat(unpack_split(packed, K))
    return (unpack_ternary if layout == "ternary" else unpack_binary)(packed, K)


def expand(packed: torch.Tensor, K: int, layout: str) -> Expanded:
    """The kept expansion of a packed weight, made now where there is none or the weight has changed since."""
    if not _keep or packed.is_inference():  # inference tensors have no version to notice in-place edits by
        return expand_codes(_codes(packed, K, layout))
    made_from = (packed._version, packed.data_ptr(), K, layout)
    entry = _kept.get(packed)
    if entry is None or entry.made_from != made_from:
        entry = _kept[packed] = expand_codes(_codes(packed, K, layout), made_from)
    return entry


def expand_codes(codes: torch.Tensor, made_from: tuple[object, ...] = ()) -> Expanded:
    """Expansion of int8 codes [rows, K]."""
    K = codes.shape[1]
    row_sum = codes.sum(1, dtype=torch.int32).float()
    # oneDNN returns the accumulators as float32: exact below 2^24, which |x| <= 128 and |w| <= 1 keep up to this K.
    prepacked = _has_onednn() and codes.numel() > 0 and 128 * K < 2**24
    weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None) if prepacked else codes.contiguous()
    return Expanded(made_from, K, codes.shape[0], weight, row_sum, prepacked)


@functools.lru_cache(maxsize=64)
def _ones_zeros(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(n), torch.zeros(n, dtype=torch.int64)


def accumulate(x: torch.Tensor, expanded: Expanded, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x int8 [M, K] times the expanded codes -> float32 [M, rows]: exact integers, times `scale` [rows] if given."""
    if not expanded.prepacked or x.shape[0] == 0:
        acc = _int_mm(x, expanded.weight).float() if x.shape[0] else x.new_zeros(0, expanded.rows, dtype=torch.float32)
        return acc if scale is None else acc.mul_(scale)
    ones, zeros = _ones_zeros(expanded.rows)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, expanded.weight, ones if scale is None else scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _int_mm(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N]."""
    if codes.shape[0] == 0 or codes.shape[1] < 2:  # `_int_mm` on CPU refuses empty operands and errs at K = 1
        return x.int() @ codes.int().t()
    return torch._int_mm(x, codes.t())


def linear_cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> torch.Tensor:
    """The op on packed weights."""
    expanded = expand(packed, x.shape[1], layout)
    return _finish(
        functools.partial(accumulate, x.contiguous(), expanded), lambda: expanded.row_sum, packed.shape[0],
        scale, bias, x_scale, x_zero_point, activation, out_dtype, layout,
    )  # fmt: skip


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
    """The op on unpacked codes."""
    expanded = expand_codes(codes.reshape(-1, x.shape[1]))
    return _finish(
        functools.partial(accumulate, x.contiguous(), expanded), lambda: expanded.row_sum, codes.shape[-2],
        scale, bias, x_scale, x_zero_point, None, out_dtype, layout,
    )  # fmt: skip


def linear_traced(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> torch.Tensor:
    """`linear_cpu` for torch.compile: an opaque product and a visible epilogue."""
    return _finish(
        functools.partial(_product_op, x, packed, layout), functools.partial(_sums_op, packed, x.shape[1], layout),
        packed.shape[0], scale, bias, x_scale, x_zero_point, activation, out_dtype, layout,
    )  # fmt: skip


def _finish(
    product: Callable[[torch.Tensor | None], torch.Tensor],
    row_sum: Callable[[], torch.Tensor],
    N: int,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> torch.Tensor:
    """Epilogue; `product` takes the scale of the weight rows or None, `row_sum` gives the sums of the codes."""
    scale = scale.expand(2, N).reshape(-1) if layout == "split" else scale.expand(N)
    scale = scale.contiguous()
    if x_zero_point is None:
        y = product(scale)
    else:
        y = product(None)
        y.addcmul_(x_zero_point.float().unsqueeze(-1), row_sum(), value=-1).mul_(scale)
    if layout == "split":
        y = y[:, :N] + y[:, N:]
    # In float32 whatever the output dtype; every pass over [M, N] counts, hence the fused multiply and add.
    x_scale = x_scale.unsqueeze(-1)
    y = y.mul_(x_scale) if bias is None else torch.addcmul(bias.float(), y, x_scale)
    if activation is not None:
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y.to(out_dtype)


# ------------------------------------------------------------------------------- what torch.compile cannot look into


def _no_cuda(*args: object) -> torch.Tensor:
    raise NotImplementedError("an op of the CPU path")


def _product(x: torch.Tensor, packed: torch.Tensor, layout: str, scale: torch.Tensor | None) -> torch.Tensor:
    return accumulate(x.contiguous(), expand(packed, x.shape[1], layout), scale)


def _product_fake(x: torch.Tensor, packed: torch.Tensor, layout: str, scale: torch.Tensor | None) -> torch.Tensor:
    rows = packed.shape[0] * (2 if layout == "split" else 1)
    return x.new_empty(x.shape[0], rows, dtype=torch.float32)


def _sums(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    return expand(packed, K, layout).row_sum.clone()  # the caller may write into it


def _sums_fake(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    return packed.new_empty(packed.shape[0] * (2 if layout == "split" else 1), dtype=torch.float32)


_product_op = define(
    "cpu_product(Tensor x, Tensor packed, str layout, Tensor? scale) -> Tensor",
    cpu=_product,
    cuda=_no_cuda,
    fake=_product_fake,
)
_sums_op = define("cpu_row_sum(Tensor packed, int K, str layout) -> Tensor", cpu=_sums, cuda=_no_cuda, fake=_sums_fake)
