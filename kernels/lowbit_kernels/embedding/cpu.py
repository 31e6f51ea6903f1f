"""`embedding`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

import torch

from ..packing import unpack_binary, unpack_split, unpack_ternary


def check_ids(name: str, ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError unless all ids are rows of the table."""
    low, high = torch.aminmax(ids)
    if low < 0 or high >= rows:
        raise IndexError(f"{name} reach from {int(low)} to {int(high)}, the table has rows 0 to {rows - 1}")


def _embedding_cpu(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, dim: int, out_dtype: torch.dtype
) -> torch.Tensor:
    if ids.numel() == 0:
        return packed.new_empty(0, dim, dtype=out_dtype)
    check_ids("ids", ids, packed.shape[0])
    return gather_rows(ids, packed, scale, bits, dim, out_dtype)


def gather_rows(
    ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, dim: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """The op in torch's own, for ids that are rows of the table."""
    rows = packed.index_select(0, ids)
    scale = scale.expand(*scale.shape[:-1], packed.shape[0]).index_select(-1, ids).unsqueeze(-1)
    if scale.dim() == 3:
        first, second = unpack_split(rows, dim)
        return (first * scale[0] + second * scale[1]).to(out_dtype)
    codes = rows[:, :dim] if bits == 8 else (unpack_ternary if bits == 2 else unpack_binary)(rows, dim)
    return (codes * scale).to(out_dtype)
