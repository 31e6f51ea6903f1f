"""Packed embedding lookup equals scale times code of the row, for every layout."""

from __future__ import annotations

import pytest
import torch

from lowbit_kernels import quantized_embedding, reference
from table_cases import table

DIMS = [1, 31, 128, 129, 300, 768]
KINDS = ["ternary", "binary", "split", "int8"]


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_equals_definition(dim: int, kind: str, per_row: bool) -> None:
    packed, scale, bits = table(kind, 23, dim, per_row)
    for ids in (torch.randint(0, 23, (3, 7)), torch.randint(0, 23, (4,), dtype=torch.int32), torch.tensor(22)):
        got = quantized_embedding(ids, packed, scale, bits, embedding_dim=dim)
        expected = reference.quantized_embedding(ids, packed, scale, bits, embedding_dim=dim)
        assert got.shape == (*ids.shape, dim)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_dtype_rounds_once(kind: str, dtype: torch.dtype) -> None:
    packed, scale, bits = table(kind, 9, 130, True)
    ids = torch.randint(0, 9, (40,))
    got = quantized_embedding(ids, packed, scale, bits, embedding_dim=130, out_dtype=dtype)
    wide = quantized_embedding(ids, packed, scale, bits, embedding_dim=130)
    assert got.dtype == dtype and torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize(("kind", "columns"), [("ternary", 128), ("binary", 256), ("split", 128), ("int8", 5)])
def test_dim_defaults_to_all_packed_columns(kind: str, columns: int) -> None:
    packed, scale, bits = table(kind, 3, 5, True)
    assert quantized_embedding(torch.tensor([0, 2]), packed, scale, bits).shape == (2, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_no_ids(kind: str) -> None:
    packed, scale, bits = table(kind, 3, 128, True)
    ids = torch.zeros(2, 0, dtype=torch.long)
    assert quantized_embedding(ids, packed, scale, bits, embedding_dim=128).shape == (2, 0, 128)


@pytest.mark.parametrize("bad", [-1, 23, 2**40])
def test_an_id_outside_the_table_raises(bad: int) -> None:
    packed, scale, bits = table("ternary", 23, 128, True)
    with pytest.raises(IndexError, match="rows 0 to 22"):
        quantized_embedding(torch.tensor([3, bad]), packed, scale, bits)


def test_bad_input_is_refused() -> None:
    packed, scale, _ = table("ternary", 4, 128, True)
    ids = torch.tensor([1])
    with pytest.raises(TypeError, match="ids"):
        quantized_embedding(ids.float(), packed, scale, 2)
    with pytest.raises(ValueError, match="bits=4, accepted: 1, 2, 8"):
        quantized_embedding(ids, packed, scale, 4)
    with pytest.raises(ValueError, match="embedding_dim=300"):
        quantized_embedding(ids, packed, scale, 2, embedding_dim=300)
    with pytest.raises(ValueError, match="scale has shape"):
        quantized_embedding(ids, packed, torch.ones(3), 2)
    with pytest.raises(ValueError, match="scale has shape"):
        quantized_embedding(ids, packed, torch.ones(2, 4), 1)
    with pytest.raises(ValueError, match="out_dtype"):
        quantized_embedding(ids, packed, scale, 2, out_dtype=torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_op_satisfies_torch_library(kind: str) -> None:
    packed, scale, bits = table(kind, 6, 130, True)
    op = torch.ops.lowbit_kernels.quantized_embedding.default
    torch.library.opcheck(op, (torch.tensor([5, 0, 1]), packed, scale, bits, 130, torch.float16))
