"""Embeddings and LayerNorm, alone and in one, with the codes of the result."""

from __future__ import annotations

import functools
import itertools

import torch

from lowbit_kernels import reference
from lowbit_kernels.embedding import gpu as embedding_gpu
from lowbit_kernels.fused_embedding import gpu as fused_embedding_gpu
from lowbit_kernels.layernorm import gpu as layernorm_gpu

from ..trial import ROUNDING, Case, Tensors, Trial, guarded, off_by

EPS = 1e-5
WORDS, TYPES, POSITIONS = 11, 3, 7


def _table(kind: str, dim: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(packed rows, a scale a row, bits)."""
    signs = torch.randint(0, 2, (2, WORDS, dim), dtype=torch.int8) * 2 - 1
    scale = torch.rand(2, WORDS) if kind == "split" else torch.rand(WORDS)
    if kind == "ternary":
        packed, bits = reference.pack_ternary(torch.randint(-1, 2, (WORDS, dim), dtype=torch.int8)), 2
    elif kind == "binary":
        packed, bits = reference.pack_binary(signs[0]), 1
    elif kind == "split":
        packed, bits = reference.pack_split(*signs), 2
    else:
        packed, bits = torch.randint(-128, 128, (WORDS, dim), dtype=torch.int8), 8
        scale /= 64
    return guarded(packed), guarded(scale), bits


def _embedding(kind: str, dim: int, dtype: torch.dtype) -> Trial:
    """Ids that are no row of the table give NaN and read nothing."""
    packed, scale, bits = _table(kind, dim)
    ids = guarded(torch.cat([torch.randint(0, WORDS, (6,)), torch.tensor([WORDS, -1, 2**40])]))
    want = reference.quantized_embedding(ids[:6], packed, scale, bits, embedding_dim=dim, out_dtype=torch.float64)
    want = torch.cat([want, torch.full((3, dim), torch.nan, dtype=torch.float64)])
    return Trial(
        [ids, packed, scale],
        lambda: [embedding_gpu.launch(ids, packed, scale, bits, dim, dtype)],
        lambda got: off_by(got[0], want, (ROUNDING[dtype] + 2.0**-23) * want.abs() + 2.0**-25),
    )


def _normalized(outputs: Tensors, want: torch.Tensor, bits: int, symmetric: bool) -> int:
    """y to rounding; codes, scales and zero points those of the y beside them."""
    y, codes, scale, zero = outputs
    found = off_by(y, want, (2 * ROUNDING[y.dtype] + 1e-6) * want.abs() + 3e-5)
    if bits:
        wanted = reference.quantize_per_token(y, bits, symmetric)
        found += off_by(codes, wanted[0]) + off_by(scale, wanted[1])
        found += 0 if symmetric else off_by(zero, wanted[2])
    return found


def _layernorm(K: int, dtype: torch.dtype, residual: bool, bits: int, symmetric: bool) -> Trial:
    x = guarded((torch.randn(5, K) * 2 + torch.randn(5, 1)).to(dtype))
    second = guarded(torch.randn(5, K).to(dtype)) if residual else None
    weight, bias = guarded(torch.rand(K) + 0.5), guarded(torch.randn(K))
    want = reference.add_layernorm(x.double(), second, weight, bias, EPS)
    return Trial(
        [x, second, weight, bias],
        lambda: layernorm_gpu.launch(x, second, weight, bias, EPS, bits, symmetric),
        lambda got: _normalized(got, want, bits, symmetric),
    )


def _fused(kind: str, dim: int, bits: int, symmetric: bool) -> Trial:
    packed, scale, embedding_bits = _table(kind, dim)
    ids, types = guarded(torch.randint(0, WORDS, (12,))), guarded(torch.randint(0, TYPES, (12,)))
    positions = guarded(torch.randint(0, POSITIONS, (4,), dtype=torch.int32))  # those of every four tokens
    type_table, position_table = guarded(torch.randn(TYPES, dim)), guarded(torch.randn(POSITIONS, dim))
    weight, bias = guarded(torch.rand(dim) + 0.5), guarded(torch.randn(dim))
    given = (ids, packed, scale, embedding_bits, types, type_table)
    want = reference.embedding_layernorm(*given, positions.repeat(3), position_table, weight, bias, EPS)
    assert isinstance(want, torch.Tensor)
    tensors = [value for value in (*given, positions, position_table, weight, bias) if isinstance(value, torch.Tensor)]
    return Trial(
        tensors,
        lambda: fused_embedding_gpu.launch(
            *given, positions, position_table, weight, bias, EPS, bits, symmetric, torch.float32
        ),
        lambda got: _normalized(got, want, bits, symmetric),
    )


KINDS = ("ternary", "binary", "split", "int8")
CASES = [
    Case(f"embedding {kind} {dim} {str(dtype)[6:]}", functools.partial(_embedding, kind, dim, dtype))
    for kind, (dim, dtype) in itertools.product(KINDS, ((300, torch.float32), (128, torch.float16)))
]
CASES += [
    Case(f"layernorm {K} {str(dtype)[6:]}{' + residual' if residual else ''}, {bits} bits", make)
    for K, dtype, residual, bits, symmetric in (
        (768, torch.float32, True, 8, False),
        (127, torch.float16, False, 8, True),
        (300, torch.bfloat16, True, 0, True),
        (1500, torch.float32, False, 4, False),
    )
    for make in (functools.partial(_layernorm, K, dtype, residual, bits, symmetric),)
]
CASES += [
    Case(
        f"embedding {kind} {dim} with LayerNorm, {bits} bits",
        functools.partial(_fused, kind, dim, bits, s),
    )
    for kind, dim, bits, s in (
        ("ternary", 300, 8, False),
        ("binary", 127, 8, True),
        ("split", 256, 0, True),
        ("int8", 300, 8, True),
    )
]
