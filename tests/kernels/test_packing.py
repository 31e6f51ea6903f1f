"""The bit layouts: golden bytes, agreement with the written-out definition, round trips of every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit_kernels
from lowbit_kernels import packing, reference

ALPHABET = {"ternary": [-1, 0, 1], "binary": [-1, 1]}
BLOCK = {"ternary": 128, "binary": 256, "split": 128}


def codes_of(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    alphabet = torch.tensor(ALPHABET[kind], dtype=torch.int8)
    return alphabet[torch.randint(len(alphabet), (rows, columns), generator=torch.Generator().manual_seed(seed))]


def pack(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(codes, packed bytes); a split pair has two codes."""
    planes = [codes_of("binary" if kind == "split" else kind, rows, columns, seed + i) for i in range(2)]
    codes = tuple(planes) if kind == "split" else (planes[0],)
    return codes, getattr(packing, f"pack_{kind}")(*codes)


def test_ternary_golden_bytes() -> None:
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, [0, 32, 64, 96]] = torch.tensor([1, -1, 0, 1], dtype=torch.int8)  # byte 0: fields 2, 0, 1, 2
    codes[0, [31, 63, 95, 127]] = -1  # byte 31
    packed = packing.pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0b10_00_01_10] + [0b01_01_01_01] * 30 + [0]]


def test_binary_golden_bytes() -> None:
    codes = -torch.ones(1, 256, dtype=torch.int8)
    codes[0, [0, 32 * 3, 32 * 7]] = 1  # byte 0: bits 0, 3 and 7
    codes[0, 32 + 5] = 1  # byte 5: bit 1
    assert packing.pack_binary(codes).tolist() == [[0b10001001, 0, 0, 0, 0, 0b10] + [0] * 26]


def test_split_golden_bytes() -> None:
    first, second = -torch.ones(2, 1, 128, dtype=torch.int8)
    first[0, [0, 96]] = 1
    second[0, [0, 32]] = 1  # byte 0: fields 3, 1, 0, 2
    assert packing.pack_split(first, second).tolist() == [[0b11_01_00_10] + [0] * 31]


def test_padding_golden_bytes() -> None:
    one = torch.ones(1, 1, dtype=torch.int8)
    assert packing.pack_ternary(one).tolist() == [[0b10_01_01_01] + [0b01_01_01_01] * 31]
    assert packing.pack_binary(one).tolist() == [[1] + [0] * 31]
    assert packing.pack_split(one, -one).tolist() == [[0b10_00_00_00] + [0] * 31]


def test_trits_golden_bytes() -> None:
    codes = torch.tensor([[1, -1, 0, 1, -1, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.int8)
    # two bytes a row; byte 0 holds columns 0, 2, 4, 6 and padding, byte 1 columns 1, 3, 5 and padding
    first = [2 + 1 * 3 + 0 * 9 + 2 * 27 + 1 * 81, 0 + 2 * 3 + 1 * 9 + 1 * 27 + 1 * 81]
    assert packing.pack_trits(codes).tolist() == [first, [121, 121]]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_trits_round_trip(rows: int, columns: int, seed: int) -> None:
    codes = codes_of("ternary", rows, columns, seed)
    packed = packing.pack_trits(codes)
    assert packed.shape == (rows, -(-columns // 5)) and packed.dtype == torch.uint8
    assert torch.equal(packing.unpack_trits(packed, columns), codes)


def test_every_byte_of_trits_round_trips() -> None:
    packed = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    codes = packing.unpack_trits(packed, 5)
    assert len({tuple(row) for row in codes.tolist()}) == 243
    assert torch.equal(packing.pack_trits(codes), packed)


def test_bytes_that_are_no_trits_are_refused() -> None:
    with pytest.raises(ValueError, match="holds 243"):
        packing.unpack_trits(torch.tensor([[0, 243]], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="K=11 needs 3"):
        packing.unpack_trits(torch.zeros(1, 2, dtype=torch.uint8), 11)
    with pytest.raises(ValueError, match="accepted codes: -1, 0, 1"):
        packing.pack_trits(torch.full((1, 5), 2, dtype=torch.int8))


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 127), (3, 128), (2, 129), (1, 255), (2, 257), (5, 768)])
def test_equals_definition(shape: tuple[int, int], kind: str) -> None:
    codes, packed = pack(kind, *shape)
    assert torch.equal(packed, getattr(reference, f"pack_{kind}")(*codes))
    assert packed.shape == (shape[0], -(-shape[1] // BLOCK[kind]) * 32)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(BLOCK)), rows=st.integers(0, 5), columns=st.integers(0, 600), seed=st.integers(0, 2**32)
)
def test_round_trip(kind: str, rows: int, columns: int, seed: int) -> None:
    codes, packed = pack(kind, rows, columns, seed)
    unpacked = getattr(packing, f"unpack_{kind}")(packed, columns)
    for got, expected in zip(unpacked if kind == "split" else (unpacked,), codes, strict=True):
        assert got.dtype == torch.int8 and torch.equal(got, expected)


@pytest.mark.parametrize("kind", BLOCK)
def test_strided_codes_pack_like_contiguous_ones(kind: str) -> None:
    codes, _ = pack(kind, 200, 7)
    strided = [code.t()[::2] for code in codes]
    assert not strided[0].is_contiguous()
    function = getattr(packing, f"pack_{kind}")
    assert torch.equal(function(*strided), function(*[code.contiguous() for code in strided]))


@pytest.mark.parametrize("kind", BLOCK)
def test_strided_bytes_unpack_like_contiguous_ones(kind: str) -> None:
    _, packed = pack(kind, 6, 500)
    function = getattr(packing, f"unpack_{kind}")
    wide = torch.cat([packed, packed], 1)[::2, : packed.shape[1]]
    got, expected = function(wide, 500), function(packed[::2].contiguous(), 500)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", BLOCK)
def test_packing_works_without_data(kind: str) -> None:
    codes = [torch.empty(3, 300, dtype=torch.int8, device="meta")] * (2 if kind == "split" else 1)
    assert getattr(packing, f"pack_{kind}")(*codes).shape == (3, -(-300 // BLOCK[kind]) * 32)


ONES = torch.ones(2, 3, dtype=torch.int8)
BAD_INPUT = [
    (packing.pack_ternary, (ONES.float(),), TypeError, "float32"),
    (packing.pack_ternary, (ONES.tolist(),), TypeError, "list"),
    (packing.pack_ternary, (ONES[0],), ValueError, "2 dimensions"),
    (packing.pack_ternary, (ONES * 2,), ValueError, "holds 2, accepted codes: -1, 0, 1"),
    (packing.pack_ternary, (ONES * -2,), ValueError, "holds -2"),
    (packing.pack_binary, (ONES * 0,), ValueError, "holds 0, accepted codes: -1, 1"),
    (packing.pack_split, (ONES, ONES * 0), ValueError, "codes2 holds 0"),
    (packing.pack_split, (ONES, ONES[:, :2]), ValueError, "one shape"),
    (packing.unpack_ternary, (packing.pack_ternary(ONES), 129), ValueError, "K=129 needs 64"),
    (packing.unpack_ternary, (packing.pack_ternary(ONES), 0), ValueError, "K=0 needs 0"),
    (packing.unpack_binary, (packing.pack_binary(ONES), 257), ValueError, "K=257 needs 64"),
    (packing.unpack_binary, (ONES, 3), TypeError, "int8"),
    (packing.unpack_split, (packing.pack_ternary(ONES), -1), ValueError, "K=-1"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD_INPUT)
def test_bad_input_is_refused_by_name(function, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


def test_every_exported_name_resolves() -> None:
    assert sorted(lowbit_kernels._HOME) == lowbit_kernels.__all__
    # A submodule of that name would hide the function once it is imported.
    assert not set(lowbit_kernels._HOME) & set(lowbit_kernels._HOME.values())
    for name in lowbit_kernels.__all__:
        assert getattr(lowbit_kernels, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        lowbit_kernels.nonsense  # noqa: B018
