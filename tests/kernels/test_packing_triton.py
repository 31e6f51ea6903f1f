"""The Triton packer gives the bytes of the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from lowbit_kernels import reference

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lowbit_kernels import packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_codes(layout: str, N: int, K: int) -> torch.Tensor:
    if layout == "ternary":
        return torch.randint(-1, 2, (N, K), dtype=torch.int8)
    signs = torch.randint(0, 2, (2, N, K), dtype=torch.int8) * 2 - 1
    return signs if layout == "split" else signs[0]


@pytest.mark.parametrize("layout", ["ternary", "binary", "split"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 127), (5, 129), (2, 768), (1, 257), (2, 4099), (0, 5), (4, 0)])
def test_bytes_and_sums(N: int, K: int, layout: str) -> None:
    codes = random_codes(layout, N, K)
    packed, sums = (part.cpu() for part in packing.launch_pack(codes.to(DEVICE), layout))
    pack = getattr(reference, f"pack_{layout}")
    assert torch.equal(packed, pack(*codes) if layout == "split" else pack(codes))
    assert torch.equal(sums, codes.long().sum(-1).int())


def test_codes_need_not_be_contiguous() -> None:
    codes = random_codes("ternary", 300, 7).t()
    packed, sums = (part.cpu() for part in packing.launch_pack(codes.to(DEVICE), "ternary"))
    assert torch.equal(packed, reference.pack_ternary(codes)) and torch.equal(sums, codes.long().sum(-1).int())
