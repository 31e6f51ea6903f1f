"""Products of the tensor cores and the layouts of their operands.

A warp's lanes are (g, t) = (lane // 4, lane % 4). In bytes the layouts of all types are one: a row of an operand is
32 bytes of K, and register r of lane (g, t) holds four bytes of it,

    A [16 rows, 32 bytes]   row g + 8 (r % 2),  bytes 16 (r // 2) + 4 t ...
    B [8 columns, 32 bytes] column g,           bytes 16 r + 4 t ...
    D [16 rows, N]          value i: row g + 8 (i // 2 % 2), column 8 (i // 4) + 2 t + i % 2

Sums of floats are computed in float64 and rounded to float32 once a product; tensor cores keep fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .findings import Fault

Array = np.ndarray
ROW = 32  # bytes of K that an instruction takes


def rows_of_a(registers: list[Array]) -> Array:
    """Four registers [threads] -> uint8 [warps, 16, 32]."""
    lanes = np.stack(registers, 1).view(np.uint8).reshape(-1, 8, 4, 2, 2, 4)  # warp, g, t, r // 2, r % 2, byte
    return np.ascontiguousarray(lanes.transpose(0, 4, 1, 3, 2, 5)).reshape(-1, 16, ROW)


def columns_of_b(registers: list[Array]) -> Array:
    """Two registers [threads] -> uint8 [warps, 8, 32]."""
    lanes = np.stack(registers, 1).view(np.uint8).reshape(-1, 8, 4, 2, 4)  # warp, g, t, r, byte
    return np.ascontiguousarray(lanes.transpose(0, 1, 3, 2, 4)).reshape(-1, 8, ROW)


def matrix_of_d(registers: list[Array]) -> Array:
    """4 N / 8 registers [threads] -> [warps, 16, N]."""
    lanes = np.stack(registers, 1).reshape(-1, 8, 4, len(registers) // 4, 2, 2)  # warp, g, t, i // 4, i // 2 % 2, i % 2
    return np.ascontiguousarray(lanes.transpose(0, 4, 1, 3, 2, 5)).reshape(-1, 16, 2 * len(registers))


def registers_of_d(matrix: Array) -> list[Array]:
    """Inverse of `matrix_of_d`."""
    warps, _, columns = matrix.shape
    lanes = matrix.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    return list(np.ascontiguousarray(lanes.reshape(32 * warps, columns // 2).T))


def multiply(a: Array, b: Array, c: Array, kind: str, saturate: bool = False) -> Array:
    """a [..., rows, 32 bytes] x b [..., columns, 32 bytes]^T + c [..., rows, columns], int32 or float32."""
    x, y = values(a, kind), values(b, kind)
    product = x @ np.swapaxes(y, -1, -2) + c.astype(np.float64)  # int8: below 2^53, so exact
    if kind not in ("s8", "u8"):
        return product.astype(np.float32)
    if saturate:
        product = np.clip(product, -(2**31), 2**31 - 1)
    return product.astype(np.int64).astype(np.int32)


def values(data: Array, kind: str) -> Array:
    """Bytes [..., n] as float64 of a type of the tensor cores."""
    if kind == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "tf32":  # the lowest 13 bits are not read
        return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return data.view({"s8": np.int8, "u8": np.uint8, "f16": np.float16}[kind]).astype(np.float64)


# --------------------------------------------------------------------------------------------------- 8 x 8 matrices


def lanes_of_matrices(rows: Array, transposed: bool) -> list[Array]:
    """ldmatrix: uint8 [warps, matrices, 8 rows, 16 bytes] -> a register [threads] a matrix.

    Lane (g, t) gets the 16-bit values 2 t and 2 t + 1 of row g.
    """
    values16 = rows.view(np.uint16)
    if transposed:
        values16 = values16.swapaxes(-1, -2)
    words = np.ascontiguousarray(values16).view(np.uint32)  # warp, matrix, g, t
    return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(words.shape[1])]


def matrices_of_lanes(registers: list[Array], transposed: bool) -> Array:
    """stmatrix: inverse of `lanes_of_matrices`."""
    words = np.stack([register.reshape(-1, 8, 4) for register in registers], 1)
    values16 = words.view(np.uint16)
    if transposed:
        values16 = np.ascontiguousarray(values16.swapaxes(-1, -2))
    return values16.view(np.uint8)


# ------------------------------------------------------------------------------------------- operands by descriptor


@dataclass(frozen=True)
class Descriptor:
    """A matrix descriptor of wgmma; all in bytes."""

    start: int
    leading: int
    stride: int
    span: int  # of the swizzle pattern: 16 (none), 32, 64, 128

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        """Raises Fault where a base offset is given, which is not emulated."""
        if bits >> 49 & 7:
            raise Fault("a wgmma descriptor with a base offset")
        low, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        return cls(low, leading, stride, (16, 128, 64, 32)[bits >> 62 & 3])

    def addresses(self, rows: int, transposed: bool) -> Array:
        """Of every 16 bytes of the operand.

        K-major: [rows, 2], 16 bytes along K each. Transposed (16-bit values): [16 values of K, rows / 8], each 8 rows
        at one place of K. Blocks of 8 lines of `span` bytes are swizzled: bits 4 to 6 of an address are flipped by
        bits 7 to 9, as many of them as the span has.
        """
        each = self.span // 16
        if transposed:
            k, chunk = np.arange(16)[:, None], np.arange(rows // 8)[None, :]
            if self.span == 16:
                # Without a swizzle the two offsets change places (CUTLASS, mma_sm90_desc.hpp).
                linear = chunk * self.stride + (k // 8) * self.leading + (k % 8) * 16
            else:
                linear = chunk % each * 16 + chunk // each * self.leading + (k % 8) * self.span + k // 8 * self.stride
        else:
            row, half = np.arange(rows)[:, None], np.arange(2)[None, :]
            across = self.leading if self.span == 16 else 16
            linear = (row // 8) * self.stride + (row % 8) * self.span + half * across
        address = self.start + linear
        return address ^ ((address >> 7 & (each - 1)) << 4)

    @staticmethod
    def arrange(data: Array, rows: int, transposed: bool) -> Array:
        """The 16 bytes at each of `addresses` -> uint8 [rows, 32], along K."""
        if not transposed:
            return data.reshape(rows, ROW)
        by_k = np.ascontiguousarray(data).view(np.uint16).reshape(16, rows)
        return np.ascontiguousarray(by_k.T).view(np.uint8)
