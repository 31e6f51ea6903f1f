"""The native CPU kernels: each kind against the others bit for bit, against torch's path, and how they are found."""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
import lowbit_kernels
from helpers import batch, tiny
from lowbit.cli import doctor
from lowbit_kernels import (
    add_layernorm,
    attention,
    codes_linear,
    embedding_layernorm,
    joint_dynamic_linear,
    joint_linear,
    native,
    packing,
    quantize_per_token,
    quantized_embedding,
    reference,
)
from lowbit_kernels.encoder import cpu as encoder_cpu

LAYOUTS = ["ternary", "binary", "split"]
EVERY_LAYOUT = list(packing.CODES_IN_A_BYTE)
SHAPES = [(1, 1, 1), (1, 17, 64), (15, 33, 63), (16, 32, 128), (33, 15, 312), (257, 50, 130), (300, 97, 520)]


def runs(kind: str) -> bool:
    try:
        native.load(kind)
    except RuntimeError:
        return False
    return True


KINDS = [kind for kind in native.KINDS[:-1] if runs(kind)]


def test_kernels_compile_where_the_processor_has_their_instructions() -> None:
    """Or everything below would be skipped, and all else run on torch's products, without a word."""
    _, compiler = native.cpp_compiler()
    for kind, needs in native._NEEDS.items():
        if compiler and needs <= native._processor():
            assert native.load(kind) is not None


needs_native = pytest.mark.skipif(not KINDS, reason="no native kernels on this machine")


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose the kernels that CPU tensors take."""
    return lambda kind: monkeypatch.setattr(native, "chosen", lambda: (kind, ""))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, using: Callable[[str], None]) -> str:
    using(request.param)
    return request.param


def of_all_kinds(using: Callable[[str], None], run: Callable[[], torch.Tensor]) -> Iterator[torch.Tensor]:
    for kind in (*KINDS, "torch"):
        using(kind)
        yield run()


def pair(layout: str) -> tuple[int, ...]:
    """How the shape of scales begins."""
    return (2,) if layout == "split" or packing.has_offset(layout) else ()


def codes_of(layout: str, N: int, K: int) -> torch.Tensor:
    if layout in packing.UNIFORM_CODES:
        least, most = packing.UNIFORM_CODES[layout]
        return torch.randint(least, most + 1, (N, K), dtype=torch.int8)
    if layout == "ternary":
        return torch.randint(-1, 2, (N, K), dtype=torch.int8)
    return torch.randint(0, 2, (2, N, K) if layout == "split" else (N, K), dtype=torch.int8) * 2 - 1


def packed_of(layout: str, codes: torch.Tensor) -> torch.Tensor:
    if layout in packing.UNIFORM_CODES:
        return packing.pack_uniform(codes, layout)
    return packing.pack_split(*codes) if layout == "split" else getattr(packing, f"pack_{layout}")(codes)


@needs_native
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linears(M: int, N: int, K: int, layout: str, zero_point: bool, using: Callable[[str], None]) -> None:
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    codes, scale = codes_of(layout, N, K), torch.rand(*pair(layout), N) + 0.1
    x_scale, bias = torch.rand(M), torch.randn(N)
    zero = torch.randint(-128, 128, (M,), dtype=torch.int32) if zero_point else None
    packed = packed_of(layout, codes)

    def together() -> torch.Tensor:
        """Two linears on one input, of which one has no bias."""
        return joint_linear(
            x, [packed, packed], [scale, scale], [bias, None], x_scale, zero, layout, None, torch.float32
        )

    *results, by_torch = of_all_kinds(using, together)
    for result in results:
        assert torch.equal(result, results[0])
    torch.testing.assert_close(results[0], by_torch, rtol=1e-5, atol=1e-5 * float(by_torch.abs().max()))
    uniform = packing.has_offset(layout)
    expected = getattr(reference, "uniform_linear" if uniform else f"{layout}_linear")(
        x, packed, scale, bias, x_scale=x_scale, x_zero_point=zero, out_dtype=torch.float64,
        **({"bits": int(layout[-1])} if uniform else {}),
    )  # fmt: skip
    close = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(results[0][:, :N].double(), expected, rtol=1e-5, atol=close)
    using(KINDS[0])
    by_codes = codes_linear(x, codes, scale, bias, x_scale, zero, layout, torch.float32)
    assert torch.equal(by_codes, results[0][:, :N])  # training and inference are one function


@needs_native
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("M", "N", "K"), [*SHAPES, (3, 5, 0), (0, 5, 70)])
def test_dynamic_linears_are_quantization_and_product(
    M: int, N: int, K: int, layout: str, bits: int, symmetric: bool, activation: str | None, kind: str
) -> None:
    x = torch.randn(K, M).t() if M % 2 else torch.randn(M, K)  # of any strides
    if M > 2 and K:
        x[1], x[2, 0] = 0.0, math.nan
    packed, scale = packed_of(layout, codes_of(layout, N, K)), torch.rand(*pair(layout), N)
    weights = [packed, packed], [scale, scale], [torch.randn(N), None]
    got = joint_dynamic_linear(x, *weights, bits, symmetric, layout, activation)
    codes, x_scale, zero_point = quantize_per_token(x, bits, symmetric)
    expected = joint_linear(codes, *weights, x_scale, zero_point, layout, activation, torch.float32)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_native
@pytest.mark.parametrize(
    ("bits", "symmetric", "error"), [(3, True, ValueError), (16, True, ValueError), (8, 1, TypeError)]
)
def test_dynamic_linears_refuse_what_quantization_does(bits: Any, symmetric: Any, error: type, kind: str) -> None:
    packed, scale = packed_of("ternary", codes_of("ternary", 8, 128)), torch.rand(8)
    with pytest.raises(error, match=r"bits|symmetric"):
        joint_dynamic_linear(torch.randn(2, 128), [packed], [scale], [None], bits, symmetric, "ternary", None)


def test_joint_linears_refuse_an_unknown_activation() -> None:
    weights = [packed_of("ternary", codes_of("ternary", 8, 128))], [torch.rand(8)], [None]
    with pytest.raises(ValueError, match="activation='relu', accepted: None, 'gelu', 'gelu_tanh'"):
        joint_dynamic_linear(torch.randn(2, 128), *weights, 8, True, "ternary", "relu")
    x = torch.ones(2, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match="activation='relu', accepted: None, 'gelu', 'gelu_tanh'"):
        joint_linear(x, *weights, torch.ones(2), None, "ternary", "relu", torch.float32)


@needs_native
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("K", [1, 3, 16, 64, 77, 520])
def test_codes_are_the_same_bytes_as_torchs(K: int, bits: int, symmetric: bool, using: Callable[[str], None]) -> None:
    x = torch.randn(37, K) * torch.logspace(-40, 37, 37).unsqueeze(1)
    x[3], x[4], x[5] = 0.0, 7.0, -3.0
    x[6, 0], x[7, -1], x[8, 0] = math.nan, math.inf, -math.inf
    x[9] = torch.rand(K) * 1e-7 + 1.0  # a range far below its values
    results = []
    for kind in (*KINDS, "torch"):
        using(kind)
        results.append(quantize_per_token(x, bits, symmetric))
    valid = ~results[-1][1].isnan()
    assert not valid[6:9].any() and valid.sum() > 30
    for q, scale, zero in results[:-1]:
        torch.testing.assert_close(scale, results[-1][1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(q[valid], results[-1][0][valid])
        assert symmetric or torch.equal(zero[valid], results[-1][2][valid])


def embeddings_of(layout: str, shape: tuple[int, ...], K: int, per_row: bool) -> list[Any]:
    """Arguments of `embedding_layernorm` up to bias; token type ids of every token, position ids [S], in two dtypes."""
    words, types, positions = 40, 3, 50
    scale = torch.rand(*pair(layout), words if per_row else 1)
    if layout == "int8":
        table: tuple = (torch.randint(-128, 128, (words, K), dtype=torch.int8), scale / 64, 8)
    else:
        table = (packed_of(layout, codes_of(layout, words, K)), scale, 1 if layout == "binary" else 2)
    ids = [torch.randint(0, words, shape), torch.randint(0, types, shape), torch.randint(0, positions, shape[-1:])]
    return [
        ids[0].int(), *table, ids[1].int(), torch.randn(types, K), ids[2], torch.randn(positions, K),
        torch.rand(K) + 0.5, torch.randn(K),
    ]  # fmt: skip


def same(got: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Bit for bit, NaN too."""
    return got is expected or torch.equal(
        *(x.view(torch.int32) if x.is_floating_point() else x for x in (got, expected))
    )


@needs_native
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "int8"])
@pytest.mark.parametrize(("shape", "K"), [((1,), 1), ((2, 17), 31), ((15,), 255), ((3, 16), 300), ((3, 43), 768)])
def test_embeddings(shape: tuple[int, ...], K: int, layout: str, per_row: bool, using: Callable[[str], None]) -> None:
    arguments = embeddings_of(layout, shape, K, per_row)
    ids, packed, scale, bits, types, type_table, positions, position_table, weight, bias = arguments
    expected = reference.embedding_layernorm(*arguments, 1e-5)
    for kind in (*KINDS, "torch"):
        using(kind)
        word = quantized_embedding(ids, packed, scale, bits, embedding_dim=K)
        v = (word + type_table[types.long()]) + position_table[positions]
        for options in ({}, {"bits": 8}, {"bits": 8, "symmetric": False}, {"bits": 4, "symmetric": False}):
            got = embedding_layernorm(*arguments, 1e-5, **options)
            chain = add_layernorm(v, None, weight, bias, 1e-5, **options)
            results, parts = (got, chain) if options else ((got,), (chain,))
            assert all(same(a, b) for a, b in zip(results, parts, strict=True))
            torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=3e-5)


@needs_native
def test_embeddings_that_are_not_finite(kind: str) -> None:
    arguments = embeddings_of("ternary", (5,), 130, True)
    arguments[0], arguments[4], arguments[6] = (
        torch.tensor([0, 1, 2, 3, 4]),
        torch.tensor([0, 0, 1, 2, 0]),
        torch.arange(5),
    )
    for place, row, value in ((2, 1, math.nan), (5, 1, math.inf), (7, 4, -math.inf)):
        arguments[place][row] = value
    y, _, scale, _ = embedding_layernorm(*arguments, bits=8)
    assert y.isnan().all(-1).tolist() == scale.isnan().tolist() == [False, True, True, False, True]


@needs_native
@pytest.mark.parametrize("name", ["ids", "token_type_ids", "position_ids"])
def test_embeddings_check_ids_of_either_dtype(name: str, kind: str) -> None:
    for dtype in (torch.int32, torch.int64):
        for bad in (-1, 50):
            arguments = embeddings_of("binary", (2, 20), 70, True)
            place = {"ids": 0, "token_type_ids": 4, "position_ids": 6}[name]
            arguments[place] = arguments[place].to(dtype)
            arguments[place].view(-1)[-1] = bad
            with pytest.raises(IndexError, match=f"^{name} reach from .*{bad}"):
                embedding_layernorm(*arguments)


@needs_native
def test_embeddings_of_tensors_with_strides(kind: str) -> None:
    arguments = embeddings_of("split", (2, 20), 300, True)
    expected = embedding_layernorm(*arguments)
    strided = [x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, torch.Tensor) else x for x in arguments]
    assert not any(x.is_contiguous() for x in strided if isinstance(x, torch.Tensor))
    assert same(embedding_layernorm(*strided), expected)


@needs_native
@pytest.mark.parametrize("lengths", [[1], [16], [17, 0, 3, 40], [70, 129]], ids=str)
@pytest.mark.parametrize("D", [5, 16, 64, 128])
def test_attention(lengths: list[int], D: int, using: Callable[[str], None]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = torch.randn(int(cu_seqlens[-1]), 3, 2, D).unbind(1)
    bias = torch.randn(2, max(lengths) + 1, max(lengths) + 1)

    def run() -> torch.Tensor:
        result = attention(
            query, key, value, cu_seqlens, max(lengths), bits=8, bias=bias, return_lse=True, importance="all"
        )
        return torch.cat([result.output.flatten(), result.lse.flatten(), result.importance])

    *results, by_torch = of_all_kinds(using, run)
    for result in results:
        assert torch.equal(result, results[0])
    # A probability on a tie between two codes may take either.
    far = (results[0] - by_torch).abs() > 2e-5
    assert far.float().mean() < 0.02
    assert (results[0] - by_torch).abs().max() < 0.05


@needs_native
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "H", "C", "F"), [(1, 16, 16, 64), (37, 48, 24, 100), (300, 130, 130, 70)])
def test_the_rest_of_a_layer_is_its_operations(
    T: int, H: int, C: int, F: int, layout: str, activation: str, kind: str
) -> None:
    context, tokens = torch.randn(T, C), torch.randn(T, H)
    shapes = [(H, C), (F, H), (H, F)]
    packed = [packed_of(layout, codes_of(layout, *shape)) for shape in shapes]
    scale = [torch.rand(*pair(layout), N) * K**-0.5 for N, K in shapes]
    bias = [torch.randn(N) for N, _ in shapes]
    norms = [torch.rand(H), torch.randn(H), torch.rand(H), torch.randn(H)]

    def product(i: int, codes: tuple, act: str | None = None) -> torch.Tensor:
        q, q_scale, zero = codes
        return joint_linear(q, [packed[i]], [scale[i]], [bias[i]], q_scale, zero, layout, act, torch.float32)

    y, *codes = add_layernorm(
        product(0, quantize_per_token(context)), tokens, norms[0], norms[1], 1e-5, bits=8, symmetric=True
    )
    inner = quantize_per_token(product(1, tuple(codes), activation), 8, False)
    expected = add_layernorm(product(2, inner), y, norms[2], norms[3], 1e-5, bits=8)
    got = encoder_cpu.encoder_rest(
        context, tokens, packed, scale, bias, norms, [layout] * 3, activation, 1e-5, 8, True, False
    )
    # GELU differs in the last place, so that now and then a value on a tie takes the other code.
    assert ((got[0] - expected[0]).abs() > 1e-4).float().mean() < 0.02
    torch.testing.assert_close(got[0], expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(got[1] * got[2].unsqueeze(-1), got[0], rtol=0, atol=float(got[2].max()) * 0.51)


@needs_native
@pytest.mark.parametrize("symmetric", [True, False])
def test_ops_of_a_layer_pass_opcheck(symmetric: bool, kind: str) -> None:
    H, packed = 32, [packed_of("ternary", codes_of("ternary", 32, 32)) for _ in range(3)]
    scale, bias, norm = [torch.rand(32)] * 3, [torch.randn(32), None, None], [torch.rand(32), torch.randn(32)]
    rest = (torch.randn(5, H), torch.randn(5, H), packed, scale, bias, norm * 2)
    torch.library.opcheck(encoder_cpu.encoder_rest, (*rest, ["ternary"] * 3, "gelu", 1e-5, 8, symmetric, not symmetric))
    q, q_scale, zero = quantize_per_token(torch.randn(5, H), 8, symmetric)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    for importance in (None, "all"):
        arguments = (
            q,
            q_scale,
            zero,
            packed,
            scale,
            bias,
            ["ternary"] * 3,
            starts,
            3,
            2,
            0.25,
            8,
            [],
            None,
            importance,
        )
        torch.library.opcheck(encoder_cpu.encoder_attention, arguments)


def layers_of(count: int, layouts: list[str], H: int, F: int, C: int) -> tuple[list, list, list, list]:
    """Packed codes, scales, biases and norms of layers."""
    shapes = [(C, H), (C, H), (C, H), (H, C), (F, H), (H, F)] * count
    packed = [packed_of(layout, codes_of(layout, *shape)) for layout, shape in zip(layouts, shapes, strict=True)]
    scale = [torch.rand(*pair(layout), N) * K**-0.5 for layout, (N, K) in zip(layouts, shapes, strict=True)]
    bias = [torch.randn(N) if number % 5 else None for number, (N, _) in enumerate(shapes)]
    return packed, scale, bias, [torch.rand(H) for _ in range(4 * count)]


def layer_by_layer(
    tokens: torch.Tensor, codes: tuple, weights: tuple[list, list, list, list], starts: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    """`encoder_layers` by its halves."""
    packed, scale, bias, norms = weights
    layouts, activation, eps, bits, ffn_symmetric, heads, position_bias = options
    symmetric = codes[2] is None
    for i in range(len(packed) // 6):
        first, rest = slice(6 * i, 6 * i + 3), slice(6 * i + 3, 6 * i + 6)
        context, _ = encoder_cpu.encoder_attention(
            *codes, packed[first], scale[first], bias[first], layouts[first], starts, int(starts.diff().max()), heads,
            0.2, bits, [], position_bias, None,
        )  # fmt: skip
        tokens, q, q_scale, zero = encoder_cpu.encoder_rest(
            context, tokens, packed[rest], scale[rest], bias[rest], norms[4 * i : 4 * i + 4], layouts[rest],
            activation, eps, bits, symmetric, ffn_symmetric,
        )  # fmt: skip
        codes = q, q_scale, None if symmetric else zero
    return tokens, *codes


@needs_native
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "int8", "uniform4", "one after the other"])
@pytest.mark.parametrize("lengths", [[1], [17, 0, 3, 40], [300, 129]], ids=str)
def test_layers_together_are_the_layers(lengths: list[int], layout: str, symmetric: bool, kind: str) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = torch.randn(int(starts[-1]), 48)
    mixed = [EVERY_LAYOUT[i % len(EVERY_LAYOUT)] for i in range(18)]
    layouts = [layout] * 18 if layout in EVERY_LAYOUT else mixed
    weights = layers_of(3, layouts, H=48, F=100, C=24)
    position_bias = torch.randn(3, max(lengths), max(lengths))
    q, q_scale, zero = quantize_per_token(tokens, 8, symmetric)
    codes = q, q_scale, None if symmetric else zero
    together = (*weights, layouts, "gelu", 1e-5, 8, symmetric, starts, 3, 0.2, [], position_bias, False)
    for _ in range(2):  # the second time with weights that are edited: what was made of the first must not be taken
        got = encoder_cpu.encoder_layers(tokens, *codes, *together)
        expected = layer_by_layer(tokens, codes, weights, starts, layouts, "gelu", 1e-5, 8, symmetric, 3, position_bias)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if b is not None)
        weights[1][4].mul_(2.0)
        weights[0][0].zero_()
        weights[3][1].add_(1.0)


@needs_native
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("lengths", [[1], [17, 0, 3, 40, 0], [0, 1, 0, 0], [300, 129]], ids=str)
def test_layers_together_that_keep_first_tokens(lengths: list[int], symmetric: bool, kind: str) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = torch.randn(int(starts[-1]), 48)
    weights = layers_of(2, ["ternary"] * 12, H=48, F=100, C=24)
    position_bias = torch.randn(3, max(lengths), max(lengths))
    q, q_scale, zero = quantize_per_token(tokens, 8, symmetric)
    codes = q, q_scale, None if symmetric else zero
    options = ("gelu", 1e-5, 8, symmetric, starts, 3, 0.2, [], position_bias)
    real = starts.diff().nonzero().squeeze(1)
    for own in (weights, [part[: len(part) // 2] for part in weights]):  # two layers; one, which is the first too
        layouts = ["ternary"] * len(own[0])
        every = encoder_cpu.encoder_layers(tokens, *codes, *own, layouts, *options, False)
        got = encoder_cpu.encoder_layers(tokens, *codes, *own, layouts, *options, True)
        for first, all_of_it in zip(got[: 3 if symmetric else 4], every, strict=False):
            assert len(first) == len(lengths)
            assert torch.equal(first[real], all_of_it[starts[real].long()])


@needs_native
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_together_hold_what_they_point_to(symmetric: bool, kind: str) -> None:
    """Nothing is kept for inference tensors: scales of a whole tensor, repeated for every row, were gone too early."""
    packed, scale, bias, norms = layers_of(3, ["ternary"] * 18, H=48, F=100, C=24)
    weights = packed, [own[:1] for own in scale], bias, norms
    tokens, starts = torch.randn(24, 48), torch.tensor([0, 24], dtype=torch.int32)
    q, q_scale, zero = quantize_per_token(tokens, 8, symmetric)
    codes = q, q_scale, None if symmetric else zero
    options = (["ternary"] * 18, "gelu", 1e-5, 8, symmetric, starts, 3, 0.2, [], None, False)
    expected = encoder_cpu.encoder_layers(tokens, *codes, *weights, *options)
    with torch.inference_mode():
        weights = [[None if tensor is None else tensor.clone() for tensor in tensors] for tensors in weights]
        got = encoder_cpu.encoder_layers(tokens, *codes, *weights, *options)
    assert all(map(torch.equal, got, expected))


@needs_native
def test_layers_together_keep_no_weights_alive(kind: str) -> None:
    weights = layers_of(2, ["ternary"] * 12, H=32, F=64, C=32)
    starts, tokens = torch.tensor([0, 2, 5], dtype=torch.int32), torch.randn(5, 32)
    options = (["ternary"] * 12, "gelu", 1e-5, 8, True, starts, 2, 0.2, [], None, False)
    torch.library.opcheck(encoder_cpu.encoder_layers, (tokens, *quantize_per_token(tokens), *weights, *options))
    gone = [weakref.ref(tensor) for tensors in weights for tensor in tensors if tensor is not None]
    del weights
    gc.collect()
    assert all(reference() is None for reference in gone)


@needs_native
@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_in_a_layer_is_that_of_torch(activation: str, approximate: str, kind: str) -> None:
    """A layer that hands one value on: an eps that drowns the variance makes LayerNorm linear."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 1e4, 1e-30, 0.0])])
    tokens = torch.stack([x, torch.zeros_like(x)], 1)
    first, both = torch.tensor([[1, 0]], dtype=torch.int8), torch.ones(2, 1, dtype=torch.int8)
    packed = [packing.pack_ternary(codes) for codes in (both, first, both)]
    scale = [torch.zeros(2), torch.ones(1), torch.tensor([1.0, 0.0])]
    eps, norm = 1e16, [torch.tensor([2e8, 0.0]), torch.zeros(2)]
    got, *_ = encoder_cpu.encoder_rest(
        torch.zeros(len(x), 1),
        tokens,
        packed,
        scale,
        [None] * 3,
        norm * 2,
        ["ternary"] * 3,
        activation,
        eps,
        8,
        True,
        True,
    )
    expected = torch.nn.functional.gelu(x.double(), approximate=approximate)
    error = (got[:, 0].double() - x.double() - expected).abs()
    assert (error <= 2e-6 + 2e-7 * x.abs()).all()  # some of it is of the sums, rounded to float32


@needs_native
def test_nan_stays_with_its_token(kind: str) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True)
    inputs = batch()
    states = torch.randn(3, 11, 64)
    expected = model.bert.encoder(states, attention_mask=inputs["attention_mask"]).last_hidden_state
    states[1, 4, 9] = math.nan
    got = model.bert.encoder(states, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@needs_native
@pytest.mark.parametrize("config", [lowbit.TernaryConfig(), lowbit.BinaryConfig()], ids=["ternary", "binary"])
def test_a_fused_model_agrees_with_torchs_products(config: lowbit.LowbitConfig, using: Callable[[str], None]) -> None:
    model, inputs = lowbit.quantize(tiny(), config, fused=True), batch(rows=5, length=37)
    with torch.inference_mode():
        *results, by_torch = of_all_kinds(using, lambda: model(**inputs).logits)
    for result in results:
        assert torch.equal(result, results[0])
    torch.testing.assert_close(results[0], by_torch, rtol=0.05, atol=0.05)


@needs_native
def test_layers_between_those_that_drop_tokens_run_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowbit.quantize(tiny(num_hidden_layers=6), lowbit.TernaryConfig(), fused=True)
    lowbit.set_length(model, lowbit.LengthConfig((1.0, 1.0, 0.6, 0.6, 0.6, 0.3)))
    inputs, encoder, together = batch(rows=5, length=37), model.bert.encoder, []
    run_layers = encoder._run_layers
    monkeypatch.setattr(encoder, "_run_layers", lambda own, *args: together.append(len(own)) or run_layers(own, *args))
    with torch.inference_mode():
        got = model(**inputs).logits
        monkeypatch.setattr(encoder, "_layers_together", lambda weights, steps: 0)
        assert torch.equal(model(**inputs).logits, got)
    assert together == [2, 3]


@needs_native
def test_nothing_is_kept_beside_the_packed_weights(kind: str) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    before = lowbit_kernels.expanded_bytes()
    model(**batch())
    assert lowbit_kernels.expanded_bytes() == before


@needs_native
def test_too_few_packed_bytes_are_refused(kind: str) -> None:
    packed = packing.pack_ternary(torch.ones(4, 128, dtype=torch.int8))
    x = torch.ones(3, 300, dtype=torch.int8)
    with pytest.raises(ValueError, match="packed has 32 bytes a row, K=300 needs 96"):
        joint_linear(x, [packed], [torch.ones(4)], [None], torch.ones(3), None, "ternary", None, torch.float32)


@needs_native
def test_threads_are_as_many_as_torchs_in_new_python_threads_too(kind: str) -> None:
    ours, threads, found = native.load(kind), torch.get_num_threads(), []
    torch.set_num_threads(threads + 2)
    try:
        # A symbol of what the library is linked to: the OpenMP that its kernels use.
        thread = threading.Thread(target=lambda: found.append((native.function("linears"), ours.omp_get_max_threads())))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert found[0][1] == threads + 2


# --- how kernels are found -------------------------------------------------------------------------------------------


class Said(logging.Handler):
    """What users are told: (level, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))

    def warnings(self) -> list[str]:
        return [text for level, text in self.records if level >= logging.WARNING]


@pytest.fixture
def said() -> Iterator[Said]:
    handler, logger = Said(), logging.getLogger("lowbit")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def forget() -> None:
    native.load.cache_clear()
    native.chosen.cache_clear()
    native._warned.clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing compiled nor chosen yet, nobody warned; the cache folder, still to be made."""
    folder, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(folder))
    monkeypatch.delenv("LOWBIT_CPU", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield folder
    forget()
    assert not list(temporary.iterdir())


@pytest.fixture
def stubs(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A processor with VNNI, and kernels that any compiles in no time; where libraries were loaded from."""
    source, loaded = tmp_path / "sources", []
    source.mkdir()
    names = ["start", *native._ARGUMENTS]
    (source / "api.cpp").write_text("\n".join(f'extern "C" int lowbit_{name}() {{ return 0; }}' for name in names))
    monkeypatch.setattr(native, "_SOURCES", source)
    monkeypatch.setattr(native, "_FLAGS", ["-shared", "-fPIC"])
    monkeypatch.setattr(native, "_processor", lambda: frozenset(native._NEEDS["vnni"]))

    class Recorded(native.Kernels):
        def __init__(self, path: str) -> None:
            folder = Path(path).parent
            loaded.append(folder)
            assert not folder.stat().st_mode & (stat.S_IWOTH | stat.S_IWGRP)
            super().__init__(path)

    monkeypatch.setattr(native, "Kernels", Recorded)
    return loaded


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_torch_multiplies(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    kind, why = native.chosen()
    assert kind == "torch" and not native.available()
    assert "no C++ compiler 'no-such-compiler'" in why or "the processor has no" in why
    monkeypatch.setenv("LOWBIT_CPU", "vnni")
    native.chosen.cache_clear()
    with pytest.raises(RuntimeError, match="LOWBIT_CPU=vnni: "):
        native.chosen()


def test_a_compiler_that_fails_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    kind, why = native.chosen()
    assert kind == "torch" and ("false failed" in why or "the processor has no" in why)
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_kind_that_is_none_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CPU", "neon")
    with pytest.raises(ValueError, match="LOWBIT_CPU='neon', accepted: amx, vnni, torch"):
        native.chosen()
    monkeypatch.setenv("LOWBIT_CPU", "torch")
    assert native.chosen() == ("torch", "LOWBIT_CPU=torch")


@needs_native
def test_a_damaged_library_is_compiled_again(fresh: Path) -> None:
    native.load(KINDS[0])
    (library,) = fresh.iterdir()
    content = library.read_bytes()
    library.unlink()  # what is mapped must not be written to
    library.write_bytes(content[:1000])
    native.load.cache_clear()
    native.load(KINDS[0])
    assert len(library.read_bytes()) == len(content)


def test_a_library_is_kept_and_found_again(
    stubs: list[Path], fresh: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.chosen()[0] == "vnni"
    (library,) = fresh.iterdir()
    forget()
    # As on a read-only file system.
    monkeypatch.setattr(shutil, "copy", fails(errno.EROFS))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", fails(errno.EROFS))
    assert native.chosen()[0] == "vnni"
    assert stubs == [fresh, fresh] and [*fresh.iterdir()] == [library] and not said.warnings()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_folder_that_is_made_is_the_users_alone(umask: int, stubs: list[Path], fresh: Path, said: Said) -> None:
    before = os.umask(umask)
    try:
        assert native.chosen()[0] == "vnni"
    finally:
        os.umask(before)
    assert stubs == [fresh] and not said.warnings()


CXX = {
    "a name": ("g++", "g++", []),
    "a launcher": ("{launcher} g++", "{launcher}", ["g++"]),
    "options": ("g++ -DA='b c'  -DD", "g++", ["-DA=b c", "-DD"]),
    "a path with spaces in quotes": ("'{spaced}' -DA", "{spaced}", ["-DA"]),
    "a path with a space that is escaped": ("{escaped}", "{spaced}", []),
    "a path with spaces": ("{spaced}", "{spaced}", []),
}


@pytest.mark.parametrize(("given", "program", "options"), CXX.values(), ids=CXX)
def test_cxx_is_words_as_in_a_shell(
    given: str, program: str, options: list[str], stubs: list[Path], said: Said, monkeypatch: Any, tmp_path: Path
) -> None:
    spaced = script(tmp_path / "with a space" / "c++", 'exec g++ "$@"')
    paths = {
        "spaced": str(spaced),
        "escaped": str(spaced).replace(" ", "\\ "),
        "launcher": str(script(tmp_path / "launcher", 'exec "$@"')),
    }
    monkeypatch.setenv("CXX", given.format(**paths))
    path = shutil.which(program.format(**paths))
    assert native.cpp_compiler() == (given.format(**paths), [path, *options])
    assert native.chosen()[0] == "vnni" and not said.warnings()


def test_options_in_cxx_make_another_library(stubs: list[Path], fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("g++", "g++ -DA", "g++ -DB"):
        monkeypatch.setenv("CXX", given)
        native.load.cache_clear()
        native.load("vnni")
    assert len({path.name.split("_")[2] for path in fresh.iterdir()}) == 3


def fails(number: int) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


def noexec(*folders: Path) -> type:
    """Kernels that do not load from folders where, or below where, they may not be executed."""

    class Refused(native.Kernels):
        def __init__(self, path: str) -> None:
            if any(folder in Path(path).parents for folder in folders):
                raise OSError(f"{path}: failed to map segment from shared object")
            super().__init__(path)

    return Refused


def file_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("")


def file_in_place_of_a_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(folder / "deeper" / "still"))


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    real = tempfile.TemporaryDirectory
    monkeypatch.setattr(
        tempfile, "TemporaryDirectory", lambda **own: fails(errno.EROFS)() if own.get("dir") else real(**own)
    )


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copy", fails(errno.ENOSPC))


def others_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def another_group_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o775)
    monkeypatch.setattr(os, "getgid", lambda: folder.stat().st_gid + 1)


def another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    owner, real = folder.stat(), Path.stat
    values = {4: 4321}  # st_uid
    other = os.stat_result([values.get(place, value) for place, value in enumerate(owner[:10])])
    monkeypatch.setattr(Path, "stat", lambda self, **own: other if self == folder else real(self, **own))


def not_executable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "Kernels", noexec(folder))


def no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWBIT_CACHE_DIR")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


USELESS = {
    file_in_its_place: "File exists",
    file_in_place_of_a_parent: "Not a directory",
    read_only: "Read-only file system",
    full: "No space left on device",
    others_write: "others may write there",
    another_group_writes: "others may write there",
    another_user: "it belongs to another user",
    not_executable: "failed to map segment",
    no_home: "there is no home folder",
}


@pytest.mark.parametrize(("make", "reason"), USELESS.items(), ids=[make.__name__ for make in USELESS])
def test_kernels_run_where_the_cache_folder_is_of_no_use(
    make: Callable[..., None], reason: str, stubs: list[Path], fresh: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(fresh, monkeypatch)
    kind, why = native.chosen()
    assert kind == "vnni" and native.function("linears") is not None
    assert all(fresh not in (folder, *folder.parents) for folder in stubs[-1:])
    (warning,) = said.warnings()
    assert reason in warning and "set LOWBIT_CACHE_DIR to a folder" in warning
    (check,) = doctor._kernels()
    assert (check.status, check.hint) == ("note", why) and warning in check.hint
    forget_choice_only()
    native.chosen()
    assert len(said.warnings()) == 1


def forget_choice_only() -> None:
    native.load.cache_clear()
    native.chosen.cache_clear()


def test_nothing_is_loaded_that_others_may_have_written(stubs: list[Path], fresh: Path, said: Said) -> None:
    native.chosen()
    fresh.chmod(0o757)
    forget()
    assert native.chosen()[0] == "vnni"
    assert stubs[0] == fresh and stubs[1] != fresh and len(said.warnings()) == 1


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")


def open_quote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-O2")


def empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")


def says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")


def says_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'test "$1" = --version || { yes "no such option" | head -n 500 >&2; printf "\\377" >&2; exit 1; }'
    monkeypatch.setenv("CXX", str(script(folder.parent / "compiler", body)))


def cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(folder.parent / "compiler", "")
    path.write_text("#!/no/such/interpreter\n")
    monkeypatch.setenv("CXX", str(path))


def takes_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_TIMEOUT", 0.3)
    monkeypatch.setenv("CXX", str(script(folder.parent / "compiler", 'test "$1" = --version || exec sleep 60')))


def makes_no_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(script(folder.parent / "compiler", "exit 0")))


def nowhere_executable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "Kernels", noexec(folder.parent))


def nowhere_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryDirectory", fails(errno.EROFS))


SLOW = {
    no_compiler: "no C++ compiler 'no-such-compiler -O2' (install g++, or name another in CXX)",
    open_quote: "name another in CXX",
    empty: "name another in CXX",
    says_nothing: "false failed (mend what it says, or name another in CXX): exit code 1",
    says_much: "failed (mend what it says, or name another in CXX): no such option",
    cannot_be_started: "No such file or directory",
    takes_for_ever: "try again",
    makes_no_library: "library.so",
    nowhere_executable: "set LOWBIT_CACHE_DIR to a folder",
    nowhere_to_write: "Read-only file system",
}


@pytest.mark.parametrize(("make", "reason"), SLOW.items(), ids=[make.__name__ for make in SLOW])
def test_slow_products_are_never_silent(
    make: Callable[..., None], reason: str, stubs: list[Path], fresh: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(fresh, monkeypatch)
    assert native.chosen()[0] == "torch"
    (warning,) = said.warnings()
    assert warning.startswith("slow products") and reason in warning
    assert "LOWBIT_CPU=torch" in warning and "amx" not in warning and len(warning) < 800
    (check,) = doctor._kernels()
    assert (check.status, check.hint) == ("note", warning)
    forget_choice_only()
    native.chosen()
    assert len(said.warnings()) == 1


def test_processors_without_the_instructions_are_no_warning(stubs: list[Path], said: Said, monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "_processor", lambda: frozenset({"avx2", "fma"}))
    kind, why = native.chosen()
    assert kind == "torch" and "vnni: the processor has no avx512" in why
    assert [level for level, _ in said.records] == [logging.INFO]


@pytest.mark.parametrize("make", SLOW, ids=lambda make: make.__name__)
def test_who_asks_for_torchs_products_is_not_warned(
    make: Callable[..., None], stubs: list[Path], fresh: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(fresh, monkeypatch)
    monkeypatch.setenv("LOWBIT_CPU", "torch")
    assert native.chosen() == ("torch", "LOWBIT_CPU=torch")
    assert not said.records and not stubs


def test_the_second_best_kernels_are_no_warning(stubs: list[Path], said: Said, monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "_processor", lambda: frozenset(native._NEEDS["amx"]))
    monkeypatch.setattr(native, "_KIND_FLAGS", {"amx": ["-no-such-option"], "vnni": []})
    kind, why = native.chosen()
    assert kind == "vnni" and why.startswith("amx: g++ failed") and not said.records


def test_the_warning_comes_with_the_first_use_and_once() -> None:
    program = """
import threading, torch, lowbit, lowbit_kernels
from lowbit_kernels import native
native._processor = lambda: frozenset(native._NEEDS["amx"])
x, weight = torch.randn(2, 64), torch.randint(-1, 2, (3, 64), dtype=torch.int8)
linear = lowbit.nn.PackedLinear.from_float(torch.nn.Linear(64, 8))
print("so far", flush=True)
threads = [threading.Thread(target=linear, args=(x,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
linear(x)
"""
    env = {**os.environ, "CXX": "no-such-compiler", "LOWBIT_CPU": ""}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first, *others = result.stdout.splitlines()
    assert (result.returncode, first, len(others)) == (0, "so far", 1)
    assert others[0].startswith("slow products")
