"""The Triton LayerNorm kernels equal the definitions (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from lowbit_kernels import reference
from lowbit_kernels.embedding import gpu as embedding_gpu
from lowbit_kernels.fused_embedding import gpu as fused_embedding_gpu
from lowbit_kernels.layernorm import gpu as layernorm_gpu

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = [(bits, symmetric) for bits in (0, 8, 4) for symmetric in (True, False)]
# The interpreter truncates to bfloat16, hence a whole ulp for it.
TOLERANCE = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# The interpreter warns where NaN arises, which is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run(op: object, *arguments: object) -> list[torch.Tensor]:
    """A launcher's result on the CPU."""
    placed = [argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    return [tensor.cpu() for tensor in op(*placed)]


def assert_codes(result: list[torch.Tensor], bits: int, symmetric: bool) -> None:
    """Codes, scale and zero point are the definition's for the y beside them; NaN in the same places."""
    y, codes, scale, zero_point = result
    if not bits:
        assert not codes.numel() + scale.numel() + zero_point.numel()
        return
    expected = reference.quantize_per_token(y, bits, symmetric)
    torch.testing.assert_close(scale, expected[1], rtol=0, atol=0, equal_nan=True)
    fine = scale.isfinite()
    assert torch.equal(codes[fine], expected[0][fine])
    assert zero_point.numel() == 0 if symmetric else torch.equal(zero_point[fine], expected[2][fine])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("K", [1, 2, 127, 768, 1024, 3001, layernorm_gpu.MAX_K])
def test_add_layernorm_equals_definition(K: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, K) * 2 + torch.randn(5, 1)).to(dtype)
    residual, weight, bias = torch.randn(5, K).to(dtype), torch.rand(K) + 0.5, torch.randn(K)
    for bits, symmetric in MODES:
        for second in (residual, None):
            got = run(layernorm_gpu.launch, x, second, weight, bias, 1e-5, bits, symmetric)
            assert got[0].dtype == dtype
            expected = reference.add_layernorm(x.double(), second, weight, bias, 1e-5)
            torch.testing.assert_close(got[0].double(), expected, rtol=TOLERANCE[dtype] + 1e-6, atol=3e-5)
            assert_codes(got, bits, symmetric)


def test_strides_and_other_parameter_dtypes() -> None:
    x, residual = torch.randn(33, 6).t(), torch.randn(6, 66)[:, ::2]
    weight, bias = torch.rand(66).half()[::2], torch.randn(33).bfloat16()
    got = run(layernorm_gpu.launch, x, residual, weight, bias, 1e-5, 8, False)
    torch.testing.assert_close(got[0], reference.add_layernorm(x, residual, weight, bias, 1e-5), rtol=1e-6, atol=3e-5)
    assert_codes(got, 8, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_shows_in_its_row_only(bad: float) -> None:
    x, weight, bias = torch.randn(4, 40), torch.rand(40), torch.randn(40)
    x[2, 17] = bad
    for symmetric in (True, False):
        got = run(layernorm_gpu.launch, x, None, weight, bias, 1e-5, 8, symmetric)
        assert got[0].isnan().all(1).tolist() == got[2].isnan().tolist() == [False, False, True, False]
        assert_codes(got, 8, symmetric)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    y, codes, scale, zero_point = run(
        layernorm_gpu.launch, torch.zeros(shape), None, torch.ones(shape[1]), torch.ones(shape[1]), 1e-5, 8, False
    )
    assert y.shape == codes.shape == shape and scale.tolist() == zero_point.tolist() == [0] * shape[0]


def embeddings(kind: str, dim: int, per_row: bool) -> list:
    """Arguments of the embedding launcher up to bias: 12 ids, as many token types, 4 positions to repeat."""
    scales = 11 if per_row else 1
    signs = [torch.randint(0, 2, (11, dim)).mul(2).sub(1).to(torch.int8) for _ in range(2)]
    words = {
        "ternary": (reference.pack_ternary(torch.randint(-1, 2, (11, dim)).to(torch.int8)), torch.rand(scales), 2),
        "binary": (reference.pack_binary(signs[0]), torch.rand(scales), 1),
        "split": (reference.pack_split(*signs), torch.rand(2, scales), 2),
        "int8": (torch.randint(-128, 128, (11, dim)).to(torch.int8), torch.rand(scales) / 64, 8),
    }[kind]
    tables = (torch.randint(0, 3, (12,)), torch.randn(3, dim), torch.randint(0, 7, (4,)).int(), torch.randn(7, dim))
    return [torch.randint(0, 11, (12,)), *words, *tables, torch.rand(dim) + 0.5, torch.randn(dim)]


def definition(arguments: list, dtype: torch.dtype) -> torch.Tensor:
    repeated = [*arguments[:6], arguments[6].repeat(3), *arguments[7:]]
    return reference.embedding_layernorm(*repeated, 1e-5, out_dtype=dtype)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", ["ternary", "binary", "split", "int8"])
@pytest.mark.parametrize("dim", [1, 127, 300, 768])
def test_embedding_layernorm_equals_definition(dim: int, kind: str, per_row: bool) -> None:
    arguments = embeddings(kind, dim, per_row)
    for bits, symmetric in MODES:
        got = run(fused_embedding_gpu.launch, *arguments, 1e-5, bits, symmetric, torch.float32)
        torch.testing.assert_close(got[0], definition(arguments, torch.float32), rtol=1e-5, atol=3e-5)
        assert_codes(got, bits, symmetric)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["ternary", "binary", "split", "int8"])
def test_embedding_layernorm_equals_the_chain_of_kernels(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, wherever the additions between them round as a GPU does."""
    arguments = embeddings(kind, 300, True)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter truncates to bfloat16, torch's additions do not")
    ids, packed, scale, bits, type_ids, type_table, position_ids, position_table, weight, bias = [
        argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument for argument in arguments
    ]
    v = embedding_gpu.launch(ids, packed, scale, bits, 300, dtype)
    v = v + type_table.to(dtype)[type_ids]
    v = v + position_table.to(dtype)[position_ids.long().repeat(3)]
    got = run(fused_embedding_gpu.launch, *arguments, 1e-5, 8, False, dtype)
    for a, b in zip(got, run(layernorm_gpu.launch, v, None, weight, bias, 1e-5, 8, False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["ternary", "binary", "split", "int8"])
def test_bad_ids_give_nan_rows(kind: str) -> None:
    arguments = embeddings(kind, 130, True)
    arguments[0][0], arguments[0][1] = 11, -1
    arguments[4][2], arguments[4][3] = 3, 2**40
    arguments[6][3] = -5  # rows 3, 7 and 11
    y, _, scale, _ = run(fused_embedding_gpu.launch, *arguments, 1e-5, 8, True, torch.float32)
    bad = [row < 4 or row % 4 == 3 for row in range(12)]
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == scale.isnan().tolist() == bad


def test_an_empty_table_is_not_read() -> None:
    arguments = embeddings("ternary", 130, False)
    arguments[1] = arguments[1][:0]
    assert run(fused_embedding_gpu.launch, *arguments, 1e-5, 0, True, torch.float32)[0].isnan().all()
