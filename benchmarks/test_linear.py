"""Linears of BERT-base on the CPU, with pytest-benchmark: `pytest benchmarks/test_linear.py --benchmark-enable`.

Same input, same thread count; the packed products are checked against int64 before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lowbit_kernels import (
    binarize,
    binary_linear,
    pack_binary,
    pack_split,
    pack_ternary,
    quantize_per_token,
    split_linear,
    ternarize,
    ternary_linear,
)

SHAPES = [(768, 768), (3072, 768), (768, 3072)]


def runners(M: int, N: int, K: int) -> dict[str, Callable[[], torch.Tensor]]:
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    codes, scale = ternarize(weight)
    signs, sign_scale = binarize(weight)
    other, other_scale = binarize(torch.randn(N, K))
    ternary, binary, pair = pack_ternary(codes), pack_binary(signs), pack_split(signs, other)
    pair_scale = torch.stack([sign_scale, other_scale])
    q, q_scale, _ = quantize_per_token(x)
    expected = (q.long() @ codes.long().T).double() * q_scale.double()[:, None] * scale.double() + bias.double()
    actual = ternary_linear(q, ternary, scale, bias, x_scale=q_scale).double()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    half = (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    return {
        "float32": lambda: torch.nn.functional.linear(x, weight, bias),
        "bfloat16": lambda: torch.nn.functional.linear(*half),
        "torch._int_mm": lambda: torch._int_mm(q, codes.T) * q_scale[:, None] * scale + bias,
        "ternary": lambda: ternary_linear(x, ternary, scale, bias),
        "binary": lambda: binary_linear(x, binary, sign_scale, bias),
        "split": lambda: split_linear(x, pair, pair_scale, bias),
    }


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("M", [1, 16, 128, 1024])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "torch._int_mm", "ternary", "binary", "split"])
def test_linear(benchmark: object, name: str, M: int, N: int, K: int) -> None:
    benchmark.group = f"M={M} N={N} K={K}"
    run = runners(M, N, K)[name]
    run()
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
