"""Packed rows as files hold them: no padding but within a byte. Kernels read whole blocks, files need not.

    ternary   uint8 [N, ceil(K/5)]    b3, see `packing`
    split     uint8 [N, ceil(K/4)]    whole blocks as in lb2, and a last one of C = ceil(rest/4) bytes
    binary    uint8 [N, ceil(K/8)]    whole blocks as in lb1, and a last one of C = ceil(rest/8) bytes

rest is K modulo the values of a block. The last block has the order of the others with C in the place of 32: byte t
holds the values t, t+C, t+2C, .. in the same bits; those past K are 0. So the form is the layout's own, byte for byte,
wherever it has as many bytes, and the length of a row says which of the two it is.
"""

from __future__ import annotations

import torch

from ._ops import check_tensor
from .packing import (
    _LB1,
    _LB2,
    BLOCK_BYTES,
    _check_columns,
    _pack,
    _pad,
    _unpack,
    check_packed,
    pack_codes,
    pack_trits,
    unpack_ternary,
    unpack_trits,
)

_SHIFTS = {"ternary": _LB2, "split": _LB2, "binary": _LB1}
_AT_A_TIME = 2**19  # codes: so many stay in cache, and take little memory beside a model that is loaded


def archive_bytes(K: int, layout: str) -> int:
    """Bytes a row in a file; layout "ternary", "binary" or "split".

    Raises:
        TypeError, ValueError: K is no whole number from 0, or another layout.
    """
    _check_columns(K)
    if K < 0 or not isinstance(layout, str) or layout not in _SHIFTS:
        raise ValueError(f"K={K}, layout={layout!r}; accepted: K from 0, {', '.join(map(repr, _SHIFTS))}")
    return -(-K // (5 if layout == "ternary" else len(_SHIFTS[layout])))


def to_archive(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    """Rows as files hold them.

    Args:
        packed: uint8 [N, ceil(K/128)*32], or [N, ceil(K/256)*32] ("binary").
        K: codes a row.
        layout: "ternary", "binary" or "split".

    Returns:
        uint8 [N, `archive_bytes(K, layout)`]; `packed` itself where nothing is left out.

    Raises:
        TypeError, ValueError: another dtype, rank or layout, bytes a row that do not fit K, codes that are not ternary.
    """
    archive_bytes(K, layout)  # refuses what is no K and no layout
    shifts = _SHIFTS[layout]
    check_packed(packed, K, len(shifts))
    if layout == "ternary":
        return pack_trits(unpack_ternary(packed, K))
    start, rest, width = _last_block(K, shifts)
    if width in (0, BLOCK_BYTES):
        return packed
    codes = _unpack(packed[:, start:], shifts, 2 ** (8 // len(shifts)) - 1, rest).view(torch.uint8)
    return torch.cat([packed[:, :start], _pack(_pad(codes, width * len(shifts), 0), shifts, width)], 1)


def from_archive(stored: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    """Inverse of `to_archive`: uint8 [N, `archive_bytes(K, layout)`] -> the layout that kernels read.

    Raises:
        TypeError, ValueError: another dtype, rank or layout, bytes a row that do not fit K, bits that are no code.
    """
    check_tensor("stored", stored, (torch.uint8,), ndim=2)
    rows, length = stored.shape
    if length != (needed := archive_bytes(K, layout)):
        raise ValueError(f"stored has {length} bytes a row, K={K} needs {needed} in a file")
    shifts = _SHIFTS[layout]
    start, _, width = _last_block(K, shifts)
    if layout != "ternary" and width in (0, BLOCK_BYTES):
        return stored
    packed = stored.new_empty(rows, start + (BLOCK_BYTES if width else 0))
    step = max(1, _AT_A_TIME // max(K, 1))
    for source, target in zip(stored.split(step), packed.split(step), strict=True):
        if layout == "ternary":
            target.copy_(pack_codes(unpack_trits(source, K), layout))
        else:
            target[:, :start] = source[:, :start]
            target[:, start:] = _whole_block(source[:, start:], K, shifts)
    return packed


def _last_block(K: int, shifts: list[int]) -> tuple[int, int, int]:
    """(bytes of the whole blocks, values after them, bytes that these take)."""
    blocks, rest = divmod(K, BLOCK_BYTES * len(shifts))
    return blocks * BLOCK_BYTES, rest, -(-rest // len(shifts))


def _whole_block(narrow: torch.Tensor, K: int, shifts: list[int]) -> torch.Tensor:
    """A last block [N, C] -> [N, 32]."""
    _, rest, width = _last_block(K, shifts)
    codes = _unpack(narrow, shifts, 2 ** (8 // len(shifts)) - 1, width * len(shifts), width).view(torch.uint8)
    if not codes.is_meta and bool(codes[:, rest:].any()):
        raise ValueError(f"stored has bits set past K={K}, which must be 0")
    return _pack(_pad(codes[:, :rest], BLOCK_BYTES * len(shifts), 0), shifts)
