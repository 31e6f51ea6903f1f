"""Several packed linears on one input as one product: queries, keys and values of a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import native
from .._derived import Derived
from .._ops import check_choice, check_device, check_flag, define, traced_on_cpu
from ..quantize.op import quantize_per_token
from .cpu import dynamic_linears_cpu, joint_bias, linears_cpu
from .gpu import ACTIVATIONS, launch, w_sums
from .gpu_uniform import expanded_codes
from .native import row_scale


def _joint_cuda(
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
    return launch(x, *_joined(packed, scale, bias), x_scale, x_zero_point, activation, out_dtype, layout)


_joint_weights, _joint_biases = Derived(), Derived()


def _joined(
    packed: Sequence[torch.Tensor], scale: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Several weights as one, for one launch: packed [sum N, bytes], a scale a row, bias."""
    if len(packed) == 1:
        return packed[0], scale[0], bias[0]
    sizes = [tensor.shape[0] for tensor in packed]

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row_scale(own, N).view(*own.shape[:-1], N) for own, N in zip(scale, sizes, strict=True)]
        return torch.cat([*packed]), torch.cat(rows, -1)

    weights = _joint_weights.get([*packed, *scale], (), make)
    given = [own for own in bias if own is not None]
    make_bias = functools.partial(joint_bias, bias, sizes, packed[0].device)
    return *weights, _joint_biases.get(given, (tuple(sizes),), make_bias) if given else None


def made_of(weights: Sequence[torch.Tensor]) -> list[Any]:
    """What is kept beside these weights and read on the GPU, for who holds addresses of it: CUDA graphs."""
    joint = _joint_weights.of(weights)
    packed = [*weights, *(own for own, _ in joint)]
    return [*joint, *_joint_biases.of(weights), *w_sums.of(packed), *expanded_codes.of(packed)]


def _joint_fake(
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
    return x.new_empty(x.shape[0], sum(tensor.shape[0] for tensor in packed), dtype=out_dtype)


_joint_op = define(
    "joint_linear(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, Tensor x_scale, Tensor? x_zero_point, "
    "str? activation, ScalarType out_dtype, str layout) -> Tensor",
    cpu=linears_cpu,
    cuda=_joint_cuda,
    fake=_joint_fake,
)


def joint_linear(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Linears that share their input (query, key and value): one product, the same bits as one by one.

    What the modules call, whose weights are known to fit each other and x: their shapes are not compared.

    Args:
        x: int8 [..., K].
        packed, scale, bias: of each linear, as `ternary_linear`.
        x_scale, x_zero_point, activation, out_dtype: as `ternary_linear`.
        layout: of all, as in `packing.CODES_IN_A_BYTE`.

    Returns:
        [..., sum of N], one result beside the other.

    Raises:
        ValueError: an unknown activation; x and the weights are on different devices.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_device(x=x, packed=packed[0], scale=scale[0], bias=bias[0])
    tokens = x.shape[:-1]
    zero = None if x_zero_point is None else x_zero_point.reshape(-1)
    run = linears_cpu if traced_on_cpu(x, natively=True) else _joint_op
    rows = x.reshape(math.prod(tokens), x.shape[-1])
    y = run(rows, packed, scale, bias, x_scale.reshape(-1), zero, activation, out_dtype, layout)
    return y.reshape(*tokens, y.shape[-1])


_dynamic_op = define(
    "joint_dynamic_linear(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, int bits, bool symmetric, "
    "str? activation, str layout) -> Tensor",
    cpu=dynamic_linears_cpu,
    fake=lambda x, packed, *others: x.new_empty(x.shape[0], sum(tensor.shape[0] for tensor in packed)),
)


def joint_dynamic_linear(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    bits: int,
    symmetric: bool,
    layout: str,
    activation: str | None,
) -> torch.Tensor:
    """`quantize_per_token` and `joint_linear`, with the same bits: one operation where native CPU kernels run.

    Args:
        x: float [..., K].
        packed, scale, bias, layout, activation: as `joint_linear`.
        bits, symmetric: as `quantize_per_token`.

    Returns:
        [..., sum of N] in x's dtype.

    Raises:
        TypeError, ValueError: bits, symmetric or activation; x and the weights are on different devices.
    """
    check_choice("bits", bits, (8, 4))
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_flag("symmetric", symmetric)
    check_device(x=x, packed=packed[0], scale=scale[0], bias=bias[0])
    # Rows without values have no range.
    together = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and native.available()
    if not together or traced_on_cpu(x, natively=True):
        codes, x_scale, zero_point = quantize_per_token(x, bits, symmetric)
        return joint_linear(codes, packed, scale, bias, x_scale, zero_point, layout, activation, x.dtype)
    rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _dynamic_op(rows, packed, scale, bias, bits, symmetric, activation, layout)
    return y.reshape(*x.shape[:-1], y.shape[-1])
