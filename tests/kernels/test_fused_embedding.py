"""The fused embeddings equal their definition and the chain of ops that they replace."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit_kernels import add_layernorm, embedding_layernorm, quantized_embedding, reference

KINDS = ["ternary", "binary", "split", "int8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORDS, TYPES, POSITIONS = 23, 3, 17


def table(kind: str, dim: int, per_row: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A random packed word table (packed by the definition), its scale and bits."""
    scales = WORDS if per_row else 1
    signs = [torch.randint(0, 2, (WORDS, dim)).mul(2).sub(1).to(torch.int8) for _ in range(2)]
    if kind == "ternary":
        return reference.pack_ternary(torch.randint(-1, 2, (WORDS, dim)).to(torch.int8)), torch.rand(scales), 2
    if kind == "binary":
        return reference.pack_binary(signs[0]), torch.rand(scales), 1
    if kind == "split":
        return reference.pack_split(*signs), torch.rand(2, scales), 2
    return torch.randint(-128, 128, (WORDS, dim)).to(torch.int8), torch.rand(scales) / 64, 8


def inputs(kind: str, dim: int, shape: tuple[int, ...] = (2, 9), per_row: bool = True, shared: bool = True) -> list:
    """Arguments up to bias; with `shared`, position ids [1, S] as BERT has them."""
    return [
        torch.randint(0, WORDS, shape),
        *table(kind, dim, per_row),
        torch.randint(0, TYPES, shape),
        torch.randn(TYPES, dim),
        torch.randint(0, POSITIONS, (*[1] * (len(shape) - 1), *shape[-1:]) if shared else shape),
        torch.randn(POSITIONS, dim),
        torch.rand(dim) + 0.5,
        torch.randn(dim),
    ]


def chain(arguments: list, eps: float, dtype: torch.dtype, **options: object) -> torch.Tensor | tuple:
    """What the op stands for."""
    ids, packed, scale, bits, type_ids, type_table, position_ids, position_table, weight, bias = arguments
    v = quantized_embedding(ids, packed, scale, bits, embedding_dim=len(weight), out_dtype=dtype)
    v = v + torch.nn.functional.embedding(type_ids, type_table.to(dtype))
    v = v + torch.nn.functional.embedding(position_ids, position_table.to(dtype))
    return add_layernorm(v, None, weight, bias, eps, **options)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 31, 129, 300, 768])
def test_equals_definition(dim: int, kind: str, per_row: bool) -> None:
    for shape, shared in (((2, 9), True), ((3, 5), False), ((4,), True), ((2, 2, 3), True), ((), True)):
        arguments = inputs(kind, dim, shape, per_row, shared)
        got = embedding_layernorm(*arguments, 1e-5)
        assert got.shape == (*shape, dim) and got.dtype == torch.float32
        torch.testing.assert_close(got, reference.embedding_layernorm(*arguments, 1e-5), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_chain_of_ops_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """In torch's own ops, since a table is in half precision; the native kernel: test_native.py."""
    arguments = inputs(kind, 130)
    arguments[4] = arguments[4].int()
    arguments[7] = arguments[7].bfloat16()
    for bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
        options = {"bits": bits, "symmetric": symmetric}
        expected = chain(arguments, 1e-12, dtype, **options)
        got = embedding_layernorm(*arguments, **options, out_dtype=dtype)
        assert got[0].dtype == dtype
        for a, b in zip(got, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    # The definition once more: half precision rounds the same sums, float64 instead of float32 after them.
    torch.testing.assert_close(
        got[0].float(),
        reference.embedding_layernorm(*arguments, out_dtype=dtype).float(),
        rtol={torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype],
        atol=3e-5,
    )


def test_the_sum_is_word_and_token_type_then_position() -> None:
    packed = reference.pack_ternary(torch.tensor([[1, -1]], dtype=torch.int8))
    zero = torch.tensor([0])
    big = torch.tensor([[2.0**25, 2.0**25]])
    got = embedding_layernorm(
        zero, packed, torch.ones(1), 2, zero, big, zero, -big, torch.ones(2), torch.zeros(2), 1.0
    )  # fmt: skip
    assert got.tolist() == [[0.0, 0.0]]  # 1 + 2^25 has lost the 1 before 2^25 is taken away
    got = embedding_layernorm(
        zero, packed, torch.ones(1), 2, zero, 0 * big, zero, 0 * big, torch.ones(2), torch.zeros(2), 3.0
    )  # fmt: skip
    assert got.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize(("place", "name"), [(0, "ids"), (4, "token_type_ids"), (6, "position_ids")])
@pytest.mark.parametrize("bad", [-1, WORDS, 2**40])
def test_an_id_outside_its_table_raises(bad: int, place: int, name: str) -> None:
    arguments = inputs("ternary", 128)
    arguments[place][0, 3] = bad
    rows = {"ids": WORDS, "token_type_ids": TYPES, "position_ids": POSITIONS}[name]
    with pytest.raises(IndexError, match=f"^{name} reach .* rows 0 to {rows - 1}$"):
        embedding_layernorm(*arguments)


def test_nan_in_a_table_shows_where_it_is_used() -> None:
    arguments = inputs("binary", 40, (1, 6))
    arguments[4] = torch.tensor([[0, 1, 2, 0, 1, 2]])
    arguments[5][1, 7] = math.nan
    y, _, scale, _ = embedding_layernorm(*arguments, bits=8)
    assert y.isnan().all(-1).tolist() == scale.isnan().tolist() == [[False, True, False, False, True, False]]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
def test_no_ids(shape: tuple[int, ...]) -> None:
    arguments = inputs("split", 130, shape)
    assert embedding_layernorm(*arguments).shape == (*shape, 130)
    y, codes, scale, zero_point = embedding_layernorm(*arguments, bits=8, symmetric=False)
    assert y.shape == codes.shape == (*shape, 130) and scale.shape == zero_point.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_op_satisfies_torch_library(kind: str, bits: int, dtype: torch.dtype) -> None:
    arguments = inputs(kind, 130)
    for place in (0, 4, 6):
        arguments[place] = arguments[place].reshape(-1)
    op = torch.ops.lowbit_kernels.embedding_layernorm.default
    torch.library.opcheck(op, (*arguments, 1e-12, bits, False, dtype))


@pytest.mark.parametrize(("dtype", "natively"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_compiled_on_the_cpu(dtype: torch.dtype, natively: bool, request: pytest.FixtureRequest) -> None:
    """The native kernel is one op; in torch's own ops they are traced and fused."""
    if not natively:
        request.getfixturevalue("torch_products")
    arguments = inputs("ternary", 130)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: embedding_layernorm(*given, 1e-5, bits=8, out_dtype=dtype), fullgraph=True)
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    for shape in ((2, 9), (3, 7), (4, 12)):  # the second makes the shapes symbolic, the third uses that code
        batch = inputs("ternary", 130, shape)
        arguments = [batch[place] if place in (0, 4, 6) else arguments[place] for place in range(len(arguments))]
        y, codes, scale, _ = compiled(*arguments)
        expected = reference.embedding_layernorm(*arguments, 1e-5, out_dtype=dtype)
        torch.testing.assert_close(y.float(), expected.float(), rtol=rtol, atol=3e-5)
        q, s, _ = reference.quantize_per_token(y)
        assert torch.equal(codes, q) and torch.equal(scale, s)


def test_bad_input_is_refused() -> None:
    arguments = inputs("ternary", 128)

    def refused(place: int, value: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            embedding_layernorm(*arguments[:place], value, *arguments[place + 1 :])

    refused(0, arguments[0].float(), TypeError, "ids has dtype torch.float32")
    refused(2, torch.ones(3), ValueError, "scale has shape")
    refused(3, 4, ValueError, "embedding_bits=4, accepted: 1, 2, 8")
    refused(4, torch.zeros(2, 8, dtype=torch.long), ValueError, r"token_type_ids has shape \(2, 8\), expected \(2, 9\)")
    refused(5, torch.ones(3, 127), ValueError, r"token_type_table has shape \(3, 127\), expected \[rows, 128\]")
    refused(6, torch.zeros(2, 1, dtype=torch.long), ValueError, r"position_ids has shape \(2, 1\)")
    refused(7, torch.ones(128), ValueError, r"position_table has shape \(128,\), expected 2 dimensions")
    refused(8, torch.ones(300), ValueError, "bias has shape")
    refused(9, torch.ones(128).long(), TypeError, "bias has dtype torch.int64")
    with pytest.raises(ValueError, match="bits=3"):
        embedding_layernorm(*arguments, bits=3)
    with pytest.raises(ValueError, match="out_dtype"):
        embedding_layernorm(*arguments, out_dtype=torch.float64)
