"""Linears on packed weights: int8 activations [M, K] x ternary, binary or split-pair codes [N, K] -> float [M, N].

    sum[m, n] = sum_k x[m, k] * w[n, k]                                          exact, int32
    acc[m, n] = sum[m, n] - x_zero_point[m] * sum_k w[n, k]                      float32 from here on
    y[m, n]   = act(x_scale[m] * scale[n] * acc[m, n] + bias[n])                 one rounding per factor
    split     y = act(x_scale[m] * (scale[0, n] * acc1[m, n] + scale[1, n] * acc2[m, n]) + bias[n])
    then      y + residual[m, n], and with out_scale clamp(rint(y * (1/out_scale)), -127, 127) as int8

The ops, for `linear_cpu.py` and `linear_triton.py` to run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import native
from ._derived import Derived
from ._ops import FLOATS, check_choice, check_device, check_flag, check_tensor, define, traced_on_cpu
from .linear_cpu import codes_linear_cpu, dynamic_linears_cpu, joint_bias, linears_cpu
from .linear_triton import ACTIVATIONS, LAYOUTS, launch, w_sums
from .packing import launch_pack
from .quantize import quantize_per_token, static_codes


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


_OPS = {layout: _define(layout) for layout in LAYOUTS}


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
        rows = [own.expand(*own.shape[:-1], N) for own, N in zip(scale, sizes, strict=True)]
        return torch.cat([*packed]), torch.cat(rows, -1)

    weights = _joint_weights.get([*packed, *scale], (), make)
    given = [own for own in bias if own is not None]
    make_bias = functools.partial(joint_bias, bias, sizes, packed[0].device)
    return *weights, _joint_biases.get(given, (tuple(sizes),), make_bias) if given else None


def made_of(weights: Sequence[torch.Tensor]) -> list[Any]:
    """What is kept beside these weights and read on the GPU, for who holds addresses of it: CUDA graphs."""
    joint = _joint_weights.of(weights)
    return [*joint, *_joint_biases.of(weights), *w_sums.of([*weights, *(packed for packed, _ in joint)])]


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
        layout: "ternary", "binary" or "split".

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
        layout: "ternary", "binary" or "split".

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
    check_tensor("packed", packed, (torch.uint8,), ndim=2)
    check_tensor("scale", scale, (torch.float32,), ndim=2 if layout == "split" else 1)
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
    block = 256 if layout == "binary" else 128
    if packed.shape[1] != -(-K // block) * 32:
        raise ValueError(
            f"x has K={K} columns, which needs {-(-K // block) * 32} packed bytes a row, got {packed.shape[1]}"
        )
    lead = (2,) if layout == "split" else ()
    if tuple(scale.shape) not in ((*lead, N), (*lead, 1)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {(*lead, N)} or {(*lead, 1)}")
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
