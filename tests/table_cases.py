"""Random packed tables of words, for the tests of embeddings."""

from __future__ import annotations

import torch

from lowbit_kernels import reference


def table(kind: str, rows: int, dim: int, per_row: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A random packed table (packed by the definition), its scale and bits."""
    scales = rows if per_row else 1
    signs = [torch.randint(0, 2, (rows, dim)).mul(2).sub(1).to(torch.int8) for _ in range(2)]
    if kind == "ternary":
        return reference.pack_ternary(torch.randint(-1, 2, (rows, dim)).to(torch.int8)), torch.rand(scales), 2
    if kind == "binary":
        return reference.pack_binary(signs[0]), torch.rand(scales), 1
    if kind == "split":
        return reference.pack_split(*signs), torch.rand(2, scales), 2
    return torch.randint(-128, 128, (rows, dim)).to(torch.int8), torch.rand(scales), 8
