"""Operands of instructions: registers, constants and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import BITS, SIZES, Unknown
from .machine import Block
from .parse import Address, Operand, Program
from .shared_memory import SharedMemory

Array = np.ndarray
_SPECIAL = re.compile(r"^%(tid|ntid|ctaid|nctaid)\.[xyz]$|^%(laneid|warpid)$")


class Operands:
    """Numbers of the registers and constants of a program, and which of them an instruction touches."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.widths: list[int] = []
        self.constants: dict[int, Array] = {}
        self.specials: dict[str, int] = {}
        self.sizes: set[int] = set()  # bytes of accesses to shared memory
        self.names: dict[object, int] = {}
        self.touched: set[int] = set()
        self.written: list[int] = []

    def _number(self, key: object, width: int) -> int:
        if key not in self.names:
            self.names[key] = len(self.widths)
            self.widths.append(width)
        return self.names[key]

    def register(self, operand: Operand, kind: str) -> int:
        """The register of an operand that is read; constants of a PTX type have one too."""
        if not isinstance(operand, str):
            raise Unknown(f"operand {operand}")
        declared = self.program.registers.get(operand) or self.program.registers.get(re.sub(r"\d+$", "", operand))
        if declared is not None:
            index = self._number(operand, 0 if declared == "pred" else SIZES[declared])
        elif _SPECIAL.match(operand):
            index = self.specials.setdefault(operand, self._number(operand, 4))
        else:
            bits = SharedMemory.START if operand == "global_smem" else _immediate(operand, kind)
            index = self._number((bits, kind), 0 if kind == "pred" else SIZES[kind])
            dtype = np.bool_ if kind == "pred" else BITS[SIZES[kind]]
            self.constants[index] = np.full(self.program.threads, bits, dtype)
        self.touched.add(index)
        return index

    def target(self, operand: Operand) -> int:
        """The register of an operand that is written."""
        index = self.register(operand, "b64")
        self.written.append(index)
        return index

    def vector(self, operand: Operand, find: Callable[..., int], *kind: str) -> list[int]:
        return [find(part, *kind) for part in (operand if isinstance(operand, tuple) else (operand,))]

    def address(self, operand: Operand) -> Callable[[Block, Array], Array]:
        """Addresses of the given threads, int64."""
        if not isinstance(operand, Address):
            raise Unknown(f"address {operand}")
        base = self.register(operand.base, "b64")
        return lambda block, lanes: block.registers[base][lanes].astype(np.int64) + operand.offset


def _immediate(text: str, kind: str) -> int:
    """The bits of a constant: an integer, or 0f or 0d and the bits of a float32 or float64."""
    if text[:2].lower() in ("0f", "0d"):
        if SIZES[kind] != (4 if text[1] in "fF" else 8):
            raise Unknown(f"{text} as {kind}")
        return int(text[2:], 16)
    number = int(text.rstrip("U"), 0)
    return int(number != 0) if kind == "pred" else number & ((1 << 8 * SIZES[kind]) - 1)
