"""The Triton embedding kernel equals the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from lowbit_kernels import reference
from lowbit_kernels.embedding import gpu as embedding_gpu
from table_cases import table

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", ["ternary", "binary", "split", "int8"])
@pytest.mark.parametrize("dim", [1, 127, 256, 300, 768])
def test_equals_definition_and_marks_bad_ids(dim: int, kind: str, per_row: bool) -> None:
    packed, scale, bits = table(kind, 11, dim, per_row)
    ids = torch.randint(0, 11, (9,))
    # The interpreter truncates to bfloat16, hence a whole ulp for it.
    for out_dtype, rtol in ((torch.float32, 1e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-7)):
        arguments = packed.to(DEVICE), scale.to(DEVICE), bits, dim, out_dtype
        expected = reference.quantized_embedding(ids, packed, scale, bits, embedding_dim=dim)
        got = embedding_gpu.launch(ids.to(DEVICE), *arguments).cpu()
        assert got.dtype == out_dtype
        torch.testing.assert_close(got.float(), expected, rtol=rtol, atol=1e-6)
        bad = embedding_gpu.launch(torch.tensor([0, 11, -1, 2**40], device=DEVICE), *arguments).cpu()
        assert bad.isnan().all(1).tolist() == [False, True, True, True]


def test_an_empty_table_is_not_read() -> None:
    packed, scale = torch.empty(0, 32, dtype=torch.uint8), torch.empty(1)
    ids = torch.tensor([0, 5], device=DEVICE)
    got = embedding_gpu.launch(ids, packed.to(DEVICE), scale.to(DEVICE), 2, 128, torch.float32)
    assert got.isnan().all()
