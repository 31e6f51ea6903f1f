"""The quantizers, whose results equal their definition to the bit."""

from __future__ import annotations

import functools

import torch

from lowbit_kernels import reference
from lowbit_kernels.quantize import gpu as quantize_gpu

from ..trial import Case, Tensors, Trial, guarded, off_by


def _values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values, a row of zeros, a constant one, one far from 0 and one with NaN, where there are as many rows."""
    x = torch.randn(shape)
    rows = x.view(-1, shape[-1])
    if len(rows) >= 5:
        rows[0], rows[1], rows[3, shape[-1] // 2] = 0.0, -2.5, float("nan")
        rows[2] += 1000
    return guarded(x.to(dtype))


def _compared(got: Tensors, want: Tensors, symmetric: bool) -> int:
    """Codes, scales, zero points; where a scale is NaN only that counts."""
    (codes, scale, zero), (wanted, wanted_scale, wanted_zero) = got, want
    good = ~wanted_scale.isnan()
    wrong = off_by(scale, wanted_scale) + off_by(codes[good], wanted[good])
    return wrong if symmetric else wrong + off_by(zero[good], wanted_zero[good])


def _per_token(shape: tuple[int, int], dtype: torch.dtype, bits: int, symmetric: bool) -> Trial:
    x = _values(*shape, dtype=dtype)
    want = reference.quantize_per_token(x, bits, symmetric)
    return Trial(
        [x], lambda: quantize_gpu.launch_per_token(x, bits, symmetric), lambda got: _compared(got, want, symmetric)
    )


def _per_tensor(shape: tuple[int, int], symmetric: bool) -> Trial:
    x = guarded(torch.randn(shape) + 0.3)
    codes, scale, zero = reference.quantize_per_tensor(x, 8, symmetric)

    def wrong(got: Tensors) -> int:
        own = off_by(got[0], codes) + off_by(got[1], scale)
        return own if symmetric else own + off_by(got[2], zero)

    return Trial([x], lambda: quantize_gpu.launch_per_tensor(x, 8, symmetric, None, None), wrong)


def _fake(shape: tuple[int, ...], dtype: torch.dtype, bits: int, symmetric: bool) -> Trial:
    """x is [A, C, B, K] transposed to [A, B, C, K] where it has four dimensions, as attention passes it."""
    x = _values(*shape, dtype=dtype)
    x = x.transpose(1, 2) if x.dim() == 4 else x
    codes, scale, zero = reference.quantize_per_token(x, bits, symmetric)
    shift = 0 if zero is None else zero.unsqueeze(-1)
    want = ((codes.float() - shift) * scale.unsqueeze(-1)).to(dtype)
    return Trial(
        [x], lambda: [quantize_gpu.launch_fake_per_token(x, bits, symmetric)], lambda got: off_by(got[0], want)
    )


def _cases() -> list[Case]:
    cases = []
    for symmetric in (True, False):
        kind = "symmetric" if symmetric else "asymmetric"
        for shape, dtype, bits in (
            ((6, 300), torch.float32, 8),
            ((5, 64), torch.float16, 4),
            ((5, 777), torch.bfloat16, 8),
            ((2, 5000), torch.float32, 8),
        ):
            name = f"rows {shape[0]}x{shape[1]} {str(dtype)[6:]}, {bits} bits {kind}"
            cases.append((name, functools.partial(_per_token, shape, dtype, bits, symmetric)))
        for shape in ((7, 301), (40, 1000)):
            cases.append((f"tensor {shape[0]}x{shape[1]} {kind}", functools.partial(_per_tensor, shape, symmetric)))
        for fake_shape, dtype, bits in (
            ((2, 9, 3, 64), torch.float16, 8),
            ((3, 2, 5, 32), torch.bfloat16, 4),
            ((6, 1000), torch.float32, 8),
        ):
            name = f"fake {'x'.join(map(str, fake_shape))} {str(dtype)[6:]}, {bits} bits {kind}"
            cases.append((name, functools.partial(_fake, fake_shape, dtype, bits, symmetric)))
    return [Case(f"quantize {name}", make) for name, make in cases]


CASES = _cases()
