"""The linears: every layout by the tile kernel in its forms and by the kernel of few tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from unittest import mock

import torch

from lowbit_kernels import reference
from lowbit_kernels.linear import gpu as linear_gpu
from lowbit_kernels.linear.gpu import Tile

from ..trial import ROUNDING, Case, Tensors, Trial, guarded, off_by


@dataclass(frozen=True)
class Form:
    """One launch; `tile` None takes the kernel of few tokens."""

    M: int
    N: int
    K: int
    tile: Tile | None
    zero_points: bool = True
    bias: torch.dtype | None = torch.bfloat16
    activation: str | None = None
    residual: bool = False
    out_dtype: torch.dtype = torch.float32  # int8: codes of the result
    one_scale: bool = False  # of the weight and of x
    strided: bool = False  # x, result and residual are parts of wider tensors


SMALL, LARGE = Tile(64, 64, 64, 4, 3, 1), Tile(128, 128, 64, 8, 3, 1)
FORMS = {
    "even": Form(70, 72, 1024, SMALL),
    "ragged": Form(70, 72, 300, SMALL, activation="gelu"),
    "odd sizes": Form(67, 71, 333, SMALL, bias=None, residual=True, strided=True),
    "16 tokens": Form(20, 72, 300, Tile(16, 64, 64, 4, 3, 1), False, None, "gelu_tanh", out_dtype=torch.float16),
    "3 slices": Form(70, 72, 1100, replace(SMALL, split_k=3), bias=torch.float32, residual=True),
    "128x128, 8 warps": Form(130, 144, 512, LARGE, activation="gelu", out_dtype=torch.bfloat16),
    "to int8": Form(70, 72, 512, SMALL, residual=True, activation="gelu", out_dtype=torch.int8),
    "128x128, slices, to int8": Form(130, 136, 1100, replace(LARGE, split_k=2), residual=True, out_dtype=torch.int8),
    "one scale": Form(70, 72, 512, SMALL, False, torch.float16, one_scale=True),
    "1 token": Form(1, 13, 300, None, activation="gelu"),
    "5 tokens": Form(5, 11, 333, None, bias=None, residual=True, out_dtype=torch.float16, strided=True),
    "8 tokens": Form(8, 13, 1024, None, activation="gelu_tanh", out_dtype=torch.int8, residual=True),
}


def _draw(form: Form, layout: str) -> Trial:
    M, N, K = form.M, form.N, form.K
    if layout == "ternary":
        codes = torch.randint(-1, 2, (1, N, K), dtype=torch.int8)
        packed = reference.pack_ternary(codes[0])
    else:
        codes = torch.randint(0, 2, (2 if layout == "split" else 1, N, K), dtype=torch.int8) * 2 - 1
        packed = reference.pack_split(*codes) if layout == "split" else reference.pack_binary(codes[0])
    x = torch.randint(-128, 128, (M, K + 16 if form.strided else K), dtype=torch.int8)
    x[0] = -128
    x = guarded(x)[:, :K]
    packed = guarded(packed)
    scale = guarded(torch.rand(len(codes), 1 if form.one_scale else N) + 0.5)
    x_scale = guarded(torch.rand(1 if form.one_scale else M) / 100 + 1e-3)
    zero = guarded(torch.randint(-300, 300, (M,), dtype=torch.int32)) if form.zero_points else None
    bias = None if form.bias is None else guarded(torch.randn(N).to(form.bias))
    residual = guarded(torch.randn(M, N + 8).to(torch.bfloat16))[:, :N] if form.residual else None
    out_scale = guarded(torch.tensor([0.05])) if form.out_dtype == torch.int8 else None
    workspaces: list[torch.Tensor] = []

    def workspace(device: torch.device, size: int) -> torch.Tensor:
        workspaces.append(torch.zeros(size, dtype=torch.int32))
        return workspaces[-1]

    def launch() -> Tensors:
        with mock.patch.object(linear_gpu, "_workspace", workspace):  # of the least size, to see its bounds kept
            out = linear_gpu.launch(
                x, packed, scale if layout == "split" else scale[0], bias, x_scale, zero, form.activation,
                form.out_dtype, layout, form.tile, residual=residual, out_scale=out_scale,
            )  # fmt: skip
        return [out, *workspaces]

    want, tolerance = _definition(form, x, codes, scale, x_scale, zero, bias, residual)

    def wrong(outputs: Tensors) -> int:
        out, *rest = outputs
        left = sum(int(tensor.count_nonzero()) for tensor in rest)  # zeros after a launch
        if form.out_dtype != torch.int8:
            return left + off_by(out, want, tolerance)
        assert out_scale is not None
        step = out_scale.double()
        # A code is that of the exact value or, within the tolerance of a tie, its neighbour.
        return left + off_by(out, (want / step).clamp(-127, 127), 0.5 + tolerance / step)

    return Trial([x, packed, scale, bias, x_scale, zero, residual, out_scale], launch, wrong)


def _definition(
    form: Form,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 sums and float64 from there on, what float32 and the output's rounding may add to it)."""
    out = torch.zeros(form.M, form.N, dtype=torch.float64)
    size = torch.zeros_like(out)  # of what is added up
    for plane, own in zip(codes.long(), scale.double(), strict=True):
        products = x.long() @ plane.T
        shift = torch.zeros_like(products) if zero is None else zero.long()[:, None] * plane.sum(1)
        factor = own * x_scale.double()[:, None]
        out += (products - shift) * factor
        size += (products.abs() + shift.abs()) * factor
    if bias is not None:
        out += bias.double()
        size += bias.double().abs()
    before = out
    if form.activation == "gelu":
        out = torch.nn.functional.gelu(out)
    elif form.activation == "gelu_tanh":
        out = torch.nn.functional.gelu(out, approximate="tanh")
    if residual is not None:
        out = out + residual.double()
        size += residual.double().abs()
    # A dozen float32 roundings, each of the size at most; GELU's slope is below 1.13 and exp2's error 2 units.
    tolerance = 16 * 2.0**-24 * size
    if form.out_dtype != torch.int8:
        own_rounding = ROUNDING[form.out_dtype]
        tolerance += own_rounding * (out.abs() + (1.13 * before.abs() if form.activation else 0)) + 2.0**-25
    return out, tolerance


CASES = [
    Case(f"linear {layout}, {name}", functools.partial(_draw, form, layout))
    for layout in linear_gpu.LAYOUTS
    for name, form in FORMS.items()
]
