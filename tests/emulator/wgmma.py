"""Hopper's asynchronous products, by four warps each."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from .arithmetic import Unknown
from .findings import Fault
from .machine import Block, Product
from .operands import Operands
from .parse import Instruction
from .products import Descriptor, matrix_of_d, multiply, registers_of_d, rows_of_a

Array = np.ndarray
Run = Callable[[Block], int | None]


def fence(operands: Operands, instruction: Instruction) -> Run:
    """wgmma.fence: registers written before may be used by the products that follow."""
    return lambda block: block.changed.clear()


def wait(operands: Operands, instruction: Instruction) -> Run:
    """wgmma.wait_group N: all but the N latest groups are complete."""
    pending = int(str(instruction.operands[0]))

    def run(block: Block) -> None:
        block.need_all("wgmma.wait_group")
        for product in block.products.wait(pending):
            product.complete()
        left = [product for group in block.products.committed for product in group] + block.products.open
        block.busy = frozenset().union(*(product.registers for product in left))

    return run


def multiplication(operands: Operands, instruction: Instruction) -> Run:
    """wgmma.mma_async, with A in registers or by a descriptor."""
    found = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)$", instruction.opcode)
    if found is None or found[4] != found[5]:
        raise Unknown(instruction.opcode)
    columns, kind, result = int(found[1]), found[4], found[3]
    if (kind, found[2], result) not in (
        ("s8", "32", "s32"), ("f16", "16", "f32"), ("bf16", "16", "f32"), ("tf32", "8", "f32")
    ):  # fmt: skip
        raise Unknown(instruction.opcode)
    d, a, b, scale, *flags = instruction.operands
    expected = 0 if kind == "s8" else 2 if kind == "tf32" else 4 - isinstance(a, tuple)
    if len(flags) != expected or set(flags[:2]) - {"1"}:
        raise Unknown(f"{instruction.opcode} with flags {flags}")
    transposed = [int(str(flag)) == 1 for flag in flags[2:]]  # of A, if it has a descriptor, and of B
    transposed_b = transposed.pop() if transposed else False
    transposed_a = transposed.pop() if transposed else False
    targets = operands.vector(d, operands.target)
    left = operands.vector(a, operands.register, "b32" if isinstance(a, tuple) else "b64")
    right = operands.register(b, "b64")
    keeps = operands.register(scale, "pred")
    own_registers = frozenset(targets) | (frozenset(left) if isinstance(a, tuple) else frozenset())
    operands.sizes.add(16)
    # The next wgmma may continue the same sums, without a wait or a fence.
    operands.touched -= own_registers
    operands.written.clear()

    def run(block: Block) -> None:
        block.need_all("wgmma")
        if not block.changed.isdisjoint(own_registers):
            block.findings.note("order", "wgmma on registers written since the last wgmma.fence")
        keep = block.registers[keeps]
        if len(block.thread) % 128:
            raise Fault("wgmma by a part of four warps")
        parts = []
        for first in range(0, len(block.thread), 128):
            lanes = slice(first, first + 128)
            own = [_operand_of(block, right, lanes, columns, transposed_b)]
            if not isinstance(a, tuple):
                own.insert(0, _operand_of(block, left[0], lanes, 64, transposed_a))
            parts.append((lanes, own))

        def compute(bytes_of: Callable[[tuple], Array]) -> None:
            results = []
            for lanes, own in parts:
                matrices = [bytes_of(operand) for operand in own]
                if isinstance(a, tuple):
                    matrices.insert(0, rows_of_a([block.registers[i][lanes] for i in left]))
                before = matrix_of_d([block.get(i, result)[lanes] for i in targets])
                before = np.where(keep[lanes].reshape(4, 32)[:, :1, None], before, before.dtype.type(0))
                after = multiply(matrices[0].reshape(4, 16, 32), matrices[1], before, kind)
                results.append(np.stack(registers_of_d(after)))
            whole = np.concatenate(results, 1)
            everyone = block.thread
            for target, values in zip(targets, whole, strict=True):
                block.put_lanes(target, everyone, values, result)

        if block.early:
            compute(lambda operand: operand[0])

        def complete() -> None:
            late = {id(operand): operand[1]() for _, own in parts for operand in own}
            if not block.early:
                compute(lambda operand: late[id(operand)])

        block.products.open.append(Product(own_registers, complete))
        block.busy |= own_registers

    return run


def _operand_of(
    block: Block, register: int, lanes: slice, rows: int, transposed: bool
) -> tuple[Array, Callable[[], Array]]:
    """(an operand in shared memory as it is now, what gives it as it is when the product is waited for), [rows, 32]."""
    bits = block.registers[register][lanes]
    if (bits != bits[0]).any():
        raise Fault(f"a wgmma descriptor that differs between threads, {block.findings.where()}")
    addresses = Descriptor.of(int(bits[0])).addresses(rows, transposed).reshape(-1)
    now, end = block.shared.begin_product(addresses, block.thread[lanes][::32])
    arrange = functools.partial(Descriptor.arrange, rows=rows, transposed=transposed)
    return arrange(now), lambda: arrange(end())
