"""The bit layouts: the one definition that GPU and CPU share, and checkpoints but for what `archive` leaves out.

    lb2   uint8 [N, ceil(K/128)*32]   blocks of 128 values -> 32 bytes, K-planar: byte t of a block holds the values
                                      t, t+32, t+64, t+96 in bits 7:6, 5:4, 3:2, 1:0
    lb1   uint8 [N, ceil(K/256)*32]   blocks of 256 values -> 32 bytes: byte t holds value t + 32*i in bit i
    lb4   uint8 [N, ceil(K/64)*32]    blocks of 64 values -> 32 bytes: byte t holds the values t, t+32 in bits 7:4, 3:0
    int8  int8 [N, K]                 a byte each

    b3    uint8 [N, ceil(K/5)]        in files only, ternary at 1.6 bits: byte t of a row of C bytes holds the values
                                      t, t+C, .., t+4C as digits of weight 1, 3, 9, 27, 81

Codes: ternary w + 1 (lb2, b3), binary (w + 1) / 2 (lb1), split pair w1 + w2/2 + 3/2 = 2*b1 + b2 (lb2); evenly spaced
levels, of which w counts the steps from one near the middle: w + 1 (lb2, "uniform2"), w + 8 (lb4, "uniform4"), w (int8:
"uniform8", and "int8" where that level is 0). K is padded with the code of 0, for binary ones with 0 bits; the
activations there are zeros, so the padding never counts. Planes rather than
neighbours share a byte so that one shift and one mask unpack a whole register (the I2_S order of bitnet.cpp).
"""

from __future__ import annotations

import torch

from ._ops import check_choice, check_device, check_tensor
from ._triton import tl, triton

BLOCK_BYTES = 32

# ---------------------------------------------------------------------------------------------------------- Triton
# Training packs every weight in every step, for the same product as `PackedLinear`'s.


@triton.jit
def _pack_kernel(
    codes_ptr, packed_ptr, sum_ptr, N, K, row_bytes, VALUES: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row: its bytes, VALUES codes each, and the sum of its codes (SPLIT: of both planes')."""
    row = tl.program_id(0).to(tl.int64)
    codes2_ptr = codes_ptr + (N + row) * K
    codes_ptr += row * K
    packed_ptr += row * row_bytes
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    total2 = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, row_bytes, BLOCK):
        byte = start + offs
        first_k = byte // 32 * (32 * VALUES) + byte % 32
        bits = tl.zeros((BLOCK,), tl.int32)
        for plane in tl.static_range(VALUES):
            k = first_k + 32 * plane
            # Past K a code is 0: of a ternary weight that is the value 1, of a binary one no bit.
            code = tl.load(codes_ptr + k, mask=k < K, other=0).to(tl.int32)
            total += code
            if VALUES == 8:
                bits |= (code > 0).to(tl.int32) << plane
            elif SPLIT:
                code2 = tl.load(codes2_ptr + k, mask=k < K, other=0).to(tl.int32)
                total2 += code2
                bits |= ((code > 0).to(tl.int32) * 2 + (code2 > 0).to(tl.int32)) << (6 - 2 * plane)
            else:
                bits |= (code + 1) << (6 - 2 * plane)
        tl.store(packed_ptr + byte, bits.to(tl.uint8), mask=byte < row_bytes)
    tl.store(sum_ptr + row, tl.sum(total, axis=0))
    if SPLIT:
        tl.store(sum_ptr + N + row, tl.sum(total2, axis=0))


def launch_pack(codes: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(`pack_codes`, sums over K as int32 [N] or [2, N]) in one launch; codes as `pack_codes` takes them."""
    N, K = codes.shape[-2:]
    values = 8 if layout == "binary" else 4
    row_bytes = triton.cdiv(K, values * BLOCK_BYTES) * BLOCK_BYTES
    packed = codes.new_empty(N, row_bytes, dtype=torch.uint8)
    sums = codes.new_empty(codes.shape[:-1], dtype=torch.int32)
    if N:
        _pack_kernel[(N,)](
            codes.contiguous(), packed, sums, N, K, row_bytes,
            VALUES=values, SPLIT=layout == "split", BLOCK=_block(row_bytes),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return packed, sums


def _block(row_bytes: int) -> int:
    return min(max(triton.next_power_of_2(row_bytes), 128), 1024)


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    signature = {"codes_ptr": "*i8", "packed_ptr": "*u8", "sum_ptr": "*i32"}
    signature |= dict.fromkeys(("N", "K", "row_bytes"), "i32:16")
    cases = []
    for layout, values in (("ternary", 4), ("split", 4), ("binary", 8)):
        for block in (128, 1024):
            constants = {"VALUES": values, "SPLIT": layout == "split", "BLOCK": block}
            cases.append((f"pack {layout} {block}", _pack_kernel, signature, constants, 4, 3))
    return cases


# ---------------------------------------------------------------------------------------------------------- layouts


def _pack(codes: torch.Tensor, shifts: list[int], width: int = BLOCK_BYTES) -> torch.Tensor:
    """Codes uint8 [N, K] (K a multiple of the block) -> bytes; plane p of a block goes to bit `shifts[p]`.

    Blocks are `width` bytes.
    """
    rows, blocks = codes.shape[0], codes.shape[1] // (len(shifts) * width)
    planes = codes.view(rows, blocks, len(shifts), width)
    first, *others = sorted(range(len(shifts)), key=lambda plane: -shifts[plane])
    packed = planes[:, :, first].clone(memory_format=torch.contiguous_format)
    for plane in others:  # in place: loading a model packs all its weights
        packed.bitwise_left_shift_(8 // len(shifts)).bitwise_or_(planes[:, :, plane])
    return packed.flatten(1)


def _unpack(packed: torch.Tensor, shifts: list[int], mask: int, columns: int, width: int = BLOCK_BYTES) -> torch.Tensor:
    """Inverse of `_pack`: bytes -> codes int8 [N, columns]."""
    rows = packed.shape[0]
    blocks = packed.view(rows, packed.shape[1] // width, width)
    planes = [(blocks >> shift) & mask for shift in shifts]
    return torch.stack(planes, 2).view(torch.int8).flatten(1)[:, :columns]


_LB2 = [6, 4, 2, 0]
_LB1 = [0, 1, 2, 3, 4, 5, 6, 7]
_LB4 = [4, 0]

# Layout -> codes in a byte of a block of 32; those with one have no blocks.
CODES_IN_A_BYTE = {"ternary": 4, "binary": 8, "split": 4, "uniform2": 4, "uniform4": 2, "uniform8": 1, "int8": 1}
UNIFORM_CODES = {"uniform2": (-1, 2), "uniform4": (-8, 7), "uniform8": (-128, 127), "int8": (-127, 127)}


def row_bytes(K: int, layout: str) -> int:
    """Bytes of a packed row of K codes."""
    values = CODES_IN_A_BYTE[layout]
    return K if values == 1 else -(-K // (BLOCK_BYTES * values)) * BLOCK_BYTES


def code_dtype(layout: str) -> torch.dtype:
    """Of packed codes: int8 where each has a byte of its own, else uint8."""
    return torch.int8 if CODES_IN_A_BYTE[layout] == 1 else torch.uint8


def has_offset(layout: str) -> bool:
    """Whether scales of this layout are pairs [2, N]: step and offset, w standing for step * w + offset."""
    return layout.startswith("uniform")


def check_layout(packed: torch.Tensor, K: int, layout: str) -> None:
    """Raise TypeError or ValueError unless `packed` holds rows of K codes in this layout."""
    check_tensor("packed", packed, (code_dtype(layout),), ndim=2)
    _check_columns(K)
    if K < 0 or packed.shape[1] != row_bytes(K, layout):
        raise ValueError(f"packed has {packed.shape[1]} bytes a row, K={K} needs {row_bytes(K, layout)}")


def _check_codes(name: str, codes: torch.Tensor, accepted: tuple[int, ...]) -> None:
    check_tensor(name, codes, (torch.int8,), ndim=2)
    if codes.is_meta or codes.numel() == 0:
        return
    # The extremes and, for binary codes, the absence of 0 say the same as `isin`, in a small part of its time.
    lowest, highest = (int(value) for value in codes.aminmax())
    if lowest < accepted[0] or highest > accepted[-1] or (0 not in accepted and not bool(codes.all())):
        wrong = codes[~torch.isin(codes, torch.tensor(accepted, dtype=torch.int8, device=codes.device))]
        raise ValueError(f"{name} holds {int(wrong[0])}, accepted codes: {', '.join(map(str, accepted))}")


def _check_columns(K: object) -> None:
    if isinstance(K, bool) or not isinstance(K, int | torch.SymInt):
        raise TypeError(f"K={K!r}, accepted: a whole number")


def check_packed(packed: torch.Tensor, columns: int, values_per_byte: int) -> None:
    check_tensor("packed", packed, (torch.uint8,), ndim=2)
    _check_columns(columns)
    needed = -(-columns // (BLOCK_BYTES * values_per_byte)) * BLOCK_BYTES
    if columns < 0 or packed.shape[1] != needed:
        raise ValueError(f"packed has {packed.shape[1]} bytes a row, K={columns} needs {needed}")


def _pad(codes: torch.Tensor, block: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % block), value=value).contiguous()


def pack_codes(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Pack without looking at the values: int8 [N, K], or [2, N, K] for "split" -> uint8, or int8 as it is."""
    if code_dtype(layout) == torch.int8:
        return codes.contiguous()
    if layout == "uniform4":
        return _pack((_pad(codes, 64, 0) + 8).view(torch.uint8), _LB4)
    if layout in ("ternary", "uniform2"):
        return _pack((_pad(codes, 128, 0) + 1).view(torch.uint8), _LB2)
    if layout == "binary":
        return _pack((_pad(codes, 256, -1) > 0).view(torch.uint8), _LB1)
    first, second = (_pad(plane, 128, -1) > 0 for plane in codes)
    return _pack(first.view(torch.uint8) * 2 + second.view(torch.uint8), _LB2)


def pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """Pack ternary codes.

    Args:
        codes: int8 [N, K] in {-1, 0, 1}; any N and K, zero included.

    Returns:
        uint8 [N, ceil(K/128)*32], layout lb2.

    Raises:
        TypeError, ValueError: another dtype, rank or code.
    """
    _check_codes("codes", codes, (-1, 0, 1))
    return pack_codes(codes, "ternary")


def unpack_ternary(packed: torch.Tensor, K: int) -> torch.Tensor:
    """Inverse of `pack_ternary`: uint8 [N, ceil(K/128)*32] -> int8 [N, K].

    Raises:
        TypeError, ValueError: another dtype or rank, or bytes a row that do not fit K.
    """
    check_packed(packed, K, 4)
    return _unpack(packed, _LB2, 3, K) - 1


def pack_binary(codes: torch.Tensor) -> torch.Tensor:
    """Pack binary codes: int8 [N, K] in {-1, 1} -> uint8 [N, ceil(K/256)*32], layout lb1.

    Raises:
        TypeError, ValueError: another dtype, rank or code.
    """
    _check_codes("codes", codes, (-1, 1))
    return pack_codes(codes, "binary")


def unpack_binary(packed: torch.Tensor, K: int) -> torch.Tensor:
    """Inverse of `pack_binary`: uint8 [N, ceil(K/256)*32] -> int8 [N, K].

    Raises:
        TypeError, ValueError: another dtype or rank, or bytes a row that do not fit K.
    """
    check_packed(packed, K, 8)
    return _unpack(packed, _LB1, 1, K) * 2 - 1


def pack_split(codes1: torch.Tensor, codes2: torch.Tensor) -> torch.Tensor:
    """Pack a pair of binary matrices of one shape (ternary weight splitting) so that one read serves both.

    Args:
        codes1, codes2: int8 [N, K] in {-1, 1}.

    Returns:
        uint8 [N, ceil(K/128)*32]: lb2 codes 2*b1 + b2 with b = (w + 1) / 2.

    Raises:
        TypeError, ValueError: another dtype, rank or code, or different shapes.
    """
    _check_codes("codes1", codes1, (-1, 1))
    _check_codes("codes2", codes2, (-1, 1))
    check_device(codes1=codes1, codes2=codes2)
    if codes1.shape != codes2.shape:
        raise ValueError(f"codes1 {tuple(codes1.shape)} and codes2 {tuple(codes2.shape)} must have one shape")
    return pack_codes(torch.stack([codes1, codes2]), "split")


def unpack_split(packed: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `pack_split`: uint8 [N, ceil(K/128)*32] -> two int8 [N, K].

    Raises:
        TypeError, ValueError: another dtype or rank, or bytes a row that do not fit K.
    """
    check_packed(packed, K, 4)
    pair = _unpack(packed, _LB2, 3, K)
    return (pair >> 1) * 2 - 1, (pair & 1) * 2 - 1


def pack_uniform(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Pack evenly spaced levels.

    Args:
        codes: int8 [N, K], steps from the level near the middle, in `UNIFORM_CODES[layout]`.
        layout: "uniform2", "uniform4", "uniform8" or "int8".

    Returns:
        uint8 [N, ceil(K/128)*32] (2 bits) or [N, ceil(K/64)*32] (4 bits); int8 [N, K], a copy.

    Raises:
        TypeError, ValueError: another dtype, rank, code or layout.
    """
    check_choice("layout", layout, tuple(UNIFORM_CODES))
    check_tensor("codes", codes, (torch.int8,), ndim=2)
    least, most = UNIFORM_CODES[layout]
    if codes.numel() and not codes.is_meta:
        lowest, highest = (int(value) for value in codes.aminmax())
        if lowest < least or highest > most:
            raise ValueError(f"codes holds {lowest if lowest < least else highest}, accepted codes: {least} to {most}")
    packed = pack_codes(codes, layout)
    return packed.clone() if packed.data_ptr() == codes.data_ptr() else packed


def unpack_uniform(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    """Inverse of `pack_uniform` -> int8 [N, K]; the packed tensor itself where a code has a byte.

    Raises:
        TypeError, ValueError: another dtype, rank or layout, or bytes a row that do not fit K.
    """
    check_choice("layout", layout, tuple(UNIFORM_CODES))
    check_layout(packed, K, layout)
    if packed.dtype == torch.int8:
        return packed
    return _unpack(packed, _LB4, 15, K) - 8 if layout == "uniform4" else _unpack(packed, _LB2, 3, K) - 1


def unpacked(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    """int8 codes of any layout: [N, K]; [2, N, K] for "split"."""
    if layout in UNIFORM_CODES:
        return unpack_uniform(packed, K, layout)
    if layout == "split":
        return torch.stack(unpack_split(packed, K))
    return (unpack_ternary if layout == "ternary" else unpack_binary)(packed, K)


_DIGITS = (1, 3, 9, 27, 81)


def pack_trits(codes: torch.Tensor) -> torch.Tensor:
    """Pack ternary codes five to a byte, for files: int8 [N, K] in {-1, 0, 1} -> uint8 [N, ceil(K/5)], layout b3.

    Raises:
        TypeError, ValueError: another dtype, rank or code.
    """
    _check_codes("codes", codes, (-1, 0, 1))
    rows, columns = codes.shape
    digits = (_pad(codes, len(_DIGITS), 0) + 1).view(torch.uint8).view(rows, len(_DIGITS), -(-columns // len(_DIGITS)))
    packed = digits[:, 0].clone()
    for plane, weight in enumerate(_DIGITS[1:], 1):
        packed += digits[:, plane] * weight
    return packed


def unpack_trits(packed: torch.Tensor, K: int) -> torch.Tensor:
    """Inverse of `pack_trits`: uint8 [N, ceil(K/5)] -> int8 [N, K].

    Raises:
        TypeError, ValueError: another dtype or shape, or a byte above 242, which five trits do not reach.
    """
    check_tensor("packed", packed, (torch.uint8,), ndim=2)
    _check_columns(K)
    rows, columns = packed.shape
    if K < 0 or columns != -(-K // len(_DIGITS)):
        raise ValueError(f"packed has {columns} bytes a row, K={K} needs {-(-K // len(_DIGITS))}")
    if packed.numel() and not packed.is_meta and int(packed.max()) >= 3 ** len(_DIGITS):
        raise ValueError(f"packed holds {int(packed.max())}; five trits reach from 0 to {3 ** len(_DIGITS) - 1}")
    codes = torch.empty(rows, len(_DIGITS), columns, dtype=torch.uint8, device=packed.device)
    rest = packed.short()
    for plane in range(len(_DIGITS)):
        # A third, rounded down, exact up to 256: integer division has no vector instruction.
        quotient = (rest + 1).mul_(85).bitwise_right_shift_(8)
        codes[:, plane] = rest.sub_(quotient, alpha=3)
        rest = quotient
    return codes.view(torch.int8).flatten(1)[:, :K] - 1
