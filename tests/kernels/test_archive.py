"""Rows as files hold them: every bit by its definition, no padding but within a byte, and back again."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_kernels import (
    archive_bytes,
    from_archive,
    pack_binary,
    pack_split,
    pack_ternary,
    pack_trits,
    packing,
    reference,
    to_archive,
)

COLUMNS = [1, 7, 31, 32, 33, 127, 128, 129, 255, 256, 257, 312, 384, 511, 513, 768]
PER_BYTE = {"ternary": 5, "split": 4, "binary": 8}


def signs(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(2, shape, generator=generator) * 2 - 1).to(torch.int8)


def pack(layout: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows as kernels read them."""
    one, other = signs(2, rows, columns, seed=seed)
    if layout == "split":
        return pack_split(one, other)
    return pack_ternary((one + other) // 2) if layout == "ternary" else pack_binary(one)


def definition(codes: numpy.ndarray, per_byte: int) -> numpy.ndarray:
    """Fields [N, K] of 8 / per_byte bits -> bytes [N, ceil(K / per_byte)], field by field.

    Blocks are 32 bytes, the last one as many as its values need, C: byte t of it holds the values t, t + C, t + 2C, ...
    """
    rows, K = codes.shape
    stored = numpy.zeros((rows, -(-K // per_byte)), numpy.int64)
    block = 32 * per_byte
    for k in range(K):
        first = k // block * block
        in_block = min(block, K - first)
        C = -(-in_block // per_byte)
        plane, t = divmod(k - first, C)
        shift = plane if per_byte == 8 else 6 - 2 * plane
        for row in range(rows):
            stored[row, first // per_byte + t] += int(codes[row, k]) << shift
    return stored


@pytest.mark.parametrize("columns", COLUMNS)
def test_binary_rows_are_the_bits_of_the_definition(columns: int) -> None:
    codes = signs(3, columns)
    packed = pack_binary(codes)
    stored = to_archive(packed, columns, "binary")
    assert stored.dtype == torch.uint8 and stored.shape == (3, -(-columns // 8)) and stored.is_contiguous()
    assert numpy.array_equal(stored.numpy(), definition((codes.numpy() + 1) // 2, 8))
    assert torch.equal(from_archive(stored, columns, "binary"), packed)


@pytest.mark.parametrize("columns", COLUMNS)
def test_pairs_are_the_bits_of_the_definition(columns: int) -> None:
    one, other = signs(2, 3, columns)
    packed = pack_split(one, other)
    stored = to_archive(packed, columns, "split")
    assert stored.shape == (3, -(-columns // 4))
    fields = (one.numpy() + 1) // 2 * 2 + (other.numpy() + 1) // 2
    assert numpy.array_equal(stored.numpy(), definition(fields, 4))
    assert torch.equal(from_archive(stored, columns, "split"), packed)


@pytest.mark.parametrize("columns", COLUMNS)
def test_ternary_rows_are_trits(columns: int) -> None:
    codes = signs(3, columns) * (signs(3, columns, seed=1) > 0)
    packed = pack_ternary(codes)
    stored = to_archive(packed, columns, "ternary")
    assert stored.shape == (3, -(-columns // 5)) and torch.equal(stored, pack_trits(codes))
    assert torch.equal(from_archive(stored, columns, "ternary"), packed)


def test_golden_bytes() -> None:
    codes = -torch.ones(1, 20, dtype=torch.int8)
    codes[0, [0, 3, 4, 19]] = (
        1  # C = 3: byte 0 holds 0, 3, .., 18, byte 1 holds 1, 4, .., 19, byte 2 holds 2, 5, .., 17
    )
    assert to_archive(pack_binary(codes), 20, "binary").tolist() == [[0b11, 0b1000010, 0]]
    one, other = -torch.ones(2, 1, 5, dtype=torch.int8)
    one[0, [0, 4]] = 1
    other[0, [0, 1]] = 1  # C = 2: byte 0 holds 0, 2 and 4, byte 1 holds 1 and 3
    assert to_archive(pack_split(one, other), 5, "split").tolist() == [[0b11_00_10_00, 0b01_00_00_00]]


@pytest.mark.parametrize("layout", PER_BYTE)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 4), columns=st.integers(0, 600), seed=st.integers(0, 2**31))
def test_round_trip(layout: str, rows: int, columns: int, seed: int) -> None:
    packed = pack(layout, rows, columns, seed)
    stored = to_archive(packed, columns, layout)
    assert stored.shape == (rows, archive_bytes(columns, layout)) == (rows, -(-columns // PER_BYTE[layout]))
    restored = from_archive(stored, columns, layout)
    assert torch.equal(restored, packed) and restored.dtype == torch.uint8


@pytest.mark.parametrize("layout", PER_BYTE)
def test_rows_of_one_length_in_both_forms_are_the_same_bytes(layout: str) -> None:
    """So the length of a row tells the forms apart, wherever they differ."""
    for columns in range(1, 520):
        packed = pack(layout, 2, columns)
        stored = to_archive(packed, columns, layout)
        assert stored.shape != packed.shape or torch.equal(stored, packed)
        if columns % (32 * PER_BYTE[layout]) == 0 and layout != "ternary":
            assert stored is packed


@pytest.mark.parametrize("layout", PER_BYTE)
def test_many_rows_are_restored_a_part_at_a_time(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(layout, 50, 300)
    monkeypatch.setattr("lowbit_kernels.archive._AT_A_TIME", 7 * 300)
    assert torch.equal(from_archive(to_archive(packed, 300, layout), 300, layout), packed)


@pytest.mark.parametrize("layout", PER_BYTE)
def test_strided_rows_are_read_like_contiguous_ones(layout: str) -> None:
    packed = pack(layout, 6, 300)
    wide = torch.cat([packed, packed], 1)[::2, : packed.shape[1]]
    stored = to_archive(packed[::2].contiguous(), 300, layout)
    assert torch.equal(to_archive(wide, 300, layout), stored)
    wide = torch.cat([stored, stored], 1)[:, : stored.shape[1]]
    assert torch.equal(from_archive(wide, 300, layout), packed[::2])


@pytest.mark.parametrize("layout", PER_BYTE)
def test_without_data_there_are_shapes(layout: str) -> None:
    packed = pack(layout, 3, 300).to("meta")
    stored = to_archive(packed, 300, layout)
    assert stored.shape == (3, archive_bytes(300, layout))
    assert from_archive(stored, 300, layout).shape == packed.shape


@pytest.mark.parametrize(("layout", "columns"), [("binary", 1), ("binary", 383), ("binary", 20), ("split", 131)])
def test_every_bit_past_the_last_value_is_refused(layout: str, columns: int) -> None:
    stored = to_archive(pack(layout, 2, columns), columns, layout)
    per_byte = PER_BYTE[layout]
    everything = to_archive(pack_binary(torch.ones(2, columns, dtype=torch.int8)), columns, "binary")
    if layout == "split":
        ones = torch.ones(2, columns, dtype=torch.int8)
        everything = to_archive(pack_split(ones, ones), columns, "split")
    unused = [(t, bit) for t in range(stored.shape[1]) for bit in range(8) if not int(everything[0, t]) >> bit & 1]
    assert len(unused) == (8 // per_byte) * (-columns % per_byte)
    for t, bit in unused:
        damaged = stored.clone()
        damaged[1, t] ^= 1 << bit
        with pytest.raises(ValueError, match=f"past K={columns}"):
            from_archive(damaged, columns, layout)


def test_padding_of_the_kernels_rows_is_not_stored() -> None:
    packed = pack_binary(-torch.ones(1, 20, dtype=torch.int8))
    packed[0, 31] = 255  # the values 31, 63, ..: none of the 20
    assert to_archive(packed, 20, "binary").tolist() == [[0, 0, 0]]


ROW = torch.zeros(2, 48, dtype=torch.uint8)
BAD_INPUT = [
    (to_archive, (ROW, 384, "binary"), ValueError, "K=384 needs 64"),
    (to_archive, (ROW.char(), 384, "binary"), TypeError, "int8"),
    (from_archive, (ROW, 385, "binary"), ValueError, "48 bytes a row, K=385 needs 49"),
    (from_archive, (ROW, 384, "split"), ValueError, "K=384 needs 96"),
    (from_archive, (ROW, -1, "binary"), ValueError, "K=-1"),
    (from_archive, (ROW, None, "binary"), TypeError, "whole number"),
    (from_archive, (ROW[0], 384, "binary"), ValueError, "2 dimensions"),
    (from_archive, (ROW.char(), 384, "binary"), TypeError, "int8"),
    (to_archive, (ROW, 384, "int8"), ValueError, "layout='int8'; accepted: .*'ternary', 'split', 'binary'"),
    (archive_bytes, (384, ["binary"]), ValueError, "layout="),
    (archive_bytes, (1.5, "binary"), TypeError, "whole number"),
    (from_archive, (ROW + 243, 240, "ternary"), ValueError, "holds 243"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD_INPUT)
def test_bad_input_is_refused_by_name(function, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("layout", ["binary", "split"])
def test_restored_rows_are_what_the_written_out_definition_unpacks(layout: str) -> None:
    packed = from_archive(to_archive(pack(layout, 2, 300, seed=3), 300, layout), 300, layout)
    got, expected = (
        getattr(packing, f"unpack_{layout}")(packed, 300),
        getattr(reference, f"unpack_{layout}")(packed, 300),
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
