"""Instructions to steps: what each does to a block. Arithmetic is in `arithmetic.py`, layouts are in `products.py`."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import wgmma
from .arithmetic import BITS, DTYPES, SIZES, Unknown, comparison, decode, encode, operation
from .findings import Fault
from .machine import Block, Groups, Kernel, Step
from .operands import Operands
from .parse import Address, Instruction, Program
from .products import (
    columns_of_b,
    lanes_of_matrices,
    matrices_of_lanes,
    matrix_of_d,
    multiply,
    registers_of_d,
    rows_of_a,
)

Array = np.ndarray
Run = Callable[[Block], int | None]


def assemble(program: Program) -> Kernel:
    """Make a program ready to run.

    Raises:
        Fault: an instruction that the emulator does not have.
    """
    assembler = _Assembler(program)
    steps = [assembler.step(instruction) for instruction in program.instructions]
    return Kernel(
        program.name,
        program.parameters,
        program.threads,
        steps,
        assembler.widths,
        assembler.constants,
        assembler.specials,
        min(assembler.sizes, default=16),
    )


class _Assembler(Operands):
    """Makes the step of an instruction by the method of its name."""

    def step(self, instruction: Instruction) -> Step:
        self.touched, self.written = set(), []
        parts = instruction.parts
        try:
            method = getattr(self, f"_{parts[0]}", None)
            special = parts[0] not in ("mov",) or any(isinstance(o, tuple) for o in instruction.operands)
            run = method(instruction) if method and special else self._compute(instruction)
        except (Unknown, KeyError, ValueError, IndexError) as error:
            raise Fault(f"the emulator does not have {instruction}: {type(error).__name__} {error}") from error
        predicate = None if instruction.predicate is None else self.register(instruction.predicate, "pred")
        return Step(
            run, predicate, instruction.negated, frozenset(self.touched), tuple(self.written),
            parts[0] in ("bra", "ret", "exit"), str(instruction),
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------- arithmetic

    def _compute(self, instruction: Instruction) -> Run:
        if instruction.opcode.startswith("cvta"):
            raise Unknown(instruction.opcode)
        own = operation(instruction.opcode)
        sources = [self.register(o, kind) for o, kind in zip(instruction.operands[1:], own.operands, strict=True)]
        pairs = list(zip(sources, own.operands, strict=True))
        target = self.target(instruction.operands[0])

        def run(block: Block) -> None:
            block.put(target, own.function(*(decode(block.registers[i], kind) for i, kind in pairs)), own.result)

        return run

    def _setp(self, instruction: Instruction) -> Run:
        """setp.lt.s32 p, a, b; setp.lt.and.s32 p|q, a, b, c."""
        parts, operands = instruction.parts, instruction.operands
        kind, combine = parts[-1], next((p for p in parts[2:-1] if p in ("and", "or", "xor")), None)
        compare = comparison(parts[1], kind)
        if "ftz" in parts or "|" in str(operands[0]):
            raise Unknown(instruction.opcode)
        a, b = (self.register(operand, kind) for operand in operands[1:3])
        other = self.register(operands[3], "pred") if combine else None
        target = self.target(operands[0])

        def run(block: Block) -> None:
            result = compare(block.get(a, kind), block.get(b, kind))
            if other is not None:
                result = getattr(np, f"logical_{combine}")(result, block.registers[other])
            block.put(target, result, "pred")

        return run

    def _mov(self, instruction: Instruction) -> Run:
        """mov.b64 {low, high}, a and its inverse."""
        kind, (to, source) = instruction.parts[-1], instruction.operands
        if isinstance(to, tuple):
            part = f"b{8 * SIZES[kind] // len(to)}"
            index = self.register(source, kind)
            targets = [None if name == "_" else self.target(name) for name in to]

            def run(block: Block) -> None:
                pieces = block.get(index, kind).view(BITS[SIZES[part]]).reshape(-1, len(targets))
                for i, target in enumerate(targets):
                    if target is not None:
                        block.put(target, np.ascontiguousarray(pieces[:, i]), part)

            return run
        part = f"b{8 * SIZES[kind] // len(source)}"
        indices, target = self.vector(source, self.register, part), self.target(to)

        def run_pack(block: Block) -> None:
            pieces = np.stack([block.get(index, part) for index in indices], 1)
            block.put(target, pieces.view(BITS[SIZES[kind]])[:, 0], kind)

        return run_pack

    # ------------------------------------------------------------------------------------------------ control

    def _bra(self, instruction: Instruction) -> Run:
        target = self.program.labels[str(instruction.operands[0])]
        return lambda block: target

    def _ret(self, instruction: Instruction) -> Run:
        return lambda block: None

    _exit = _ret

    def _bar(self, instruction: Instruction) -> Run:
        if instruction.opcode == "bar.warp.sync":
            return lambda block: block.clock.warp_barrier(block.whole_warps("a barrier"))
        if instruction.opcode != "bar.sync" or instruction.operands != ("0",):
            raise Unknown("a barrier of some threads")
        return lambda block: block.arrive()

    def _fence(self, instruction: Instruction) -> Run:
        if instruction.opcode.startswith("fence.proxy.async"):
            return lambda block: block.shared.fence()
        return lambda block: None

    def _membar(self, instruction: Instruction) -> Run:
        return lambda block: None

    # ------------------------------------------------------------------------------------------------- memory

    def _ld(self, instruction: Instruction) -> Run:
        parts, kind = instruction.parts, instruction.parts[-1]
        if len(instruction.operands) != 2:
            raise Unknown("a load with a cache policy")
        targets = self.vector(instruction.operands[0], self.target)
        if "param" in parts:
            (target,), address = targets, instruction.operands[1]
            if not isinstance(address, Address):
                raise Unknown(f"address {address}")

            def run_param(block: Block) -> None:
                raw = block.arguments[address.base][address.offset : address.offset + SIZES[kind]]
                block.put(target, np.full(len(block.thread), np.frombuffer(raw, DTYPES[kind])[0]), kind)

            return run_param
        each, size, shared = SIZES[kind], SIZES[kind] * len(targets), self._shared(parts)
        address_of = self.address(instruction.operands[1])
        if shared:
            self.sizes.add(size)

        def run(block: Block) -> None:
            lanes = block.lanes()
            address = address_of(block, lanes)
            if shared:
                data = block.shared.read(address, size, lanes)
            else:
                data = block.memory.read(address, size, lanes, block.clock)
            for i, target in enumerate(targets):
                own = np.ascontiguousarray(data[:, each * i : each * (i + 1)]).view(BITS[each])[:, 0]
                block.put_lanes(target, lanes, decode(own, kind), kind)

        return run

    def _st(self, instruction: Instruction) -> Run:
        kind = instruction.parts[-1]
        sources = self.vector(instruction.operands[1], self.register, kind)
        address_of = self.address(instruction.operands[0])
        each, shared = SIZES[kind], self._shared(instruction.parts)
        if shared:
            self.sizes.add(each * len(sources))

        def run(block: Block) -> None:
            lanes = block.lanes()
            values = [block.registers[source][lanes].astype(BITS[each]) for source in sources]
            data = np.stack(values, 1).view(np.uint8)
            address = address_of(block, lanes)
            if shared:
                block.shared.write(address, data, lanes)
            else:
                block.memory.write(address, data, lanes, block.clock)

        return run

    def _shared(self, parts: list[str]) -> bool:
        shared = any(part in ("shared", "shared::cta") for part in parts)
        if not shared and "global" not in parts:
            raise Unknown(f"{parts[0]} of other than global and shared memory")
        return shared

    def _atom(self, instruction: Instruction) -> Run:
        """Atomics of global memory; threads of an instruction come one after the other."""
        parts, kind = instruction.parts, instruction.parts[-1]
        operands = list(instruction.operands)
        target = self.target(operands.pop(0)) if parts[0] == "atom" else None
        address_of = self.address(operands[0])
        values = [self.register(operand, kind) for operand in operands[1:]]
        name = next((p for p in parts if p in ("add", "min", "max", "and", "or", "exch", "cas")), None)
        order = next((p for p in parts if p in ("acquire", "release", "acq_rel")), "relaxed")
        if name is None or "global" not in parts or len(values) != (2 if name == "cas" else 1):
            raise Unknown(instruction.opcode)
        compute = None if name in ("exch", "cas") else operation(f"{name}.{kind}").function

        def run(block: Block) -> None:
            lanes = block.lanes()
            own = [block.get(value, kind)[lanes] for value in values]

            def change(i: int, old: Array) -> Array:
                before = decode(old.view(BITS[SIZES[kind]]), kind)
                if compute:
                    after = compute(before, own[0][i : i + 1])
                elif name == "exch":
                    after = own[0][i : i + 1]
                else:
                    after = np.where(before == own[0][i], own[1][i : i + 1], before)
                return encode(after, kind, SIZES[kind]).view(np.uint8)

            address = address_of(block, lanes)
            raw = block.memory.update(address, SIZES[kind], change, order, lanes, block.clock)
            old = raw.view(BITS[SIZES[kind]])[:, 0]
            if target is not None:
                block.put_lanes(target, lanes, decode(old, kind), kind)

        return run

    _red = _atom

    def _cp(self, instruction: Instruction) -> Run:
        """cp.async of 4, 8 or 16 bytes, of which the last operand says how many are read (the rest is 0)."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "cp.async.commit_group":
            return self._commit(lambda block: block.copies)
        if opcode in ("cp.async.wait_group", "cp.async.wait_all"):
            pending = int(str(operands[0])) if operands else 0

            def wait(block: Block) -> None:
                block.need_all(opcode)
                if not operands:
                    block.copies.commit()
                for perform in block.copies.wait(pending):
                    perform(True)

            return wait
        if not opcode.startswith(("cp.async.ca.shared.global", "cp.async.cg.shared.global")):
            raise Unknown(opcode)
        to, source, size = self.address(operands[0]), self.address(operands[1]), int(str(operands[2]), 0)
        read = self.register(operands[3] if len(operands) > 3 else str(size), "u32")
        self.sizes.add(size)

        def run(block: Block) -> None:
            lanes = block.lanes()
            count = block.registers[read][lanes]
            data = np.zeros((len(lanes), size), np.uint8)
            for length in np.unique(count[count > 0]):
                chosen = count == length
                own = lanes[chosen]
                data[chosen, :length] = block.memory.read(source(block, own), int(length), own, block.clock)
            perform = block.shared.begin_copy(to(block, lanes), data, lanes)
            if block.early:
                perform(False)
            block.copies.open.append(perform)

        return run

    def _commit(self, groups: Callable[[Block], Groups]) -> Run:
        def run(block: Block) -> None:
            block.need_all("a commit of asynchronous work")
            groups(block).commit()

        return run

    def _ldmatrix(self, instruction: Instruction) -> Run:
        targets, transposed = self.vector(instruction.operands[0], self.target), "trans" in instruction.parts
        address_of, count = self.address(instruction.operands[1]), len(instruction.operands[0])
        self._check_matrix(instruction, count)

        def run(block: Block) -> None:
            lanes = block.whole_warps("ldmatrix")
            givers = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
            data = block.shared.read(address_of(block, givers), 16, givers)
            for target, values in zip(
                targets, lanes_of_matrices(data.reshape(-1, count, 8, 16), transposed), strict=True
            ):
                block.put_lanes(target, lanes, values, "b32")

        return run

    def _stmatrix(self, instruction: Instruction) -> Run:
        sources = self.vector(instruction.operands[1], self.register, "b32")
        address_of, count = self.address(instruction.operands[0]), len(sources)
        transposed = "trans" in instruction.parts
        self._check_matrix(instruction, count)

        def run(block: Block) -> None:
            lanes = block.whole_warps("stmatrix")
            givers = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
            data = matrices_of_lanes([block.registers[source][lanes] for source in sources], transposed)
            block.shared.write(address_of(block, givers), data.reshape(-1, 16), givers)

        return run

    def _check_matrix(self, instruction: Instruction, count: int) -> None:
        if f"x{count}" not in instruction.parts or "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
            raise Unknown(instruction.opcode)
        self.sizes.add(16)

    # ---------------------------------------------------------------------------------------- between threads

    def _shfl(self, instruction: Instruction) -> Run:
        mode, operands = instruction.parts[2], instruction.operands
        a, b, c, _ = (self.register(operand, "b32") for operand in operands[1:])
        names = str(operands[0]).split("|")
        target = self.target(names[0])
        found = self.target(names[1]) if len(names) > 1 else None

        def run(block: Block) -> None:
            block.whole_warps("shfl")
            lane = block.thread % 32
            own, limit = (block.registers[i].astype(np.int64) for i in (b, c))
            own, clamp, segment = own & 31, limit & 31, limit >> 8 & 31
            highest = (lane & segment) | (clamp & ~segment)
            wanted = {
                "up": lane - own, "down": lane + own, "bfly": lane ^ own, "idx": (lane & segment) | (own & ~segment)
            }[mode]  # fmt: skip
            inside = wanted >= highest if mode == "up" else wanted <= highest
            source = block.thread // 32 * 32 + np.where(inside, wanted, lane)
            if not block.active[source[block.active]].all():
                raise Fault(f"shfl from a thread that takes no part, {block.findings.where()}")
            block.put(target, block.registers[a][source], "b32")
            if found is not None:
                block.put(found, inside, "pred")

        return run

    def _redux(self, instruction: Instruction) -> Run:
        """redux.sync.add.s32 over a warp."""
        kind = instruction.parts[-1]
        names = {"add": np.add, "min": np.minimum, "max": np.maximum}
        names |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        reduce = names[instruction.parts[2]].reduce
        source, target = self.register(instruction.operands[1], kind), self.target(instruction.operands[0])

        def run(block: Block) -> None:
            block.whole_warps("redux")
            values = block.get(source, kind).reshape(-1, 32)
            block.put(target, np.repeat(reduce(values, axis=1).astype(values.dtype), 32), kind)

        return run

    # ----------------------------------------------------------------------------------------------- products

    def _mma(self, instruction: Instruction) -> Run:
        found = re.match(
            r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(\.satfinite)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)$", instruction.opcode
        )
        if found is None or found[4] != found[5] or (found[3], found[6]) not in (("s32", "s32"), ("f32", "f32")):
            raise Unknown(instruction.opcode)
        kind, result = found[4], found[3]
        if (kind, found[1]) not in (("s8", "32"), ("f16", "16"), ("bf16", "16"), ("tf32", "8")):
            raise Unknown(instruction.opcode)
        d, a, b, c = instruction.operands
        sources = [self.vector(operand, self.register, "b32") for operand in (a, b, c)]
        targets = self.vector(d, self.target)

        def run(block: Block) -> None:
            block.whole_warps("mma")
            left, right = (
                find([block.registers[i] for i in own])
                for find, own in ((rows_of_a, sources[0]), (columns_of_b, sources[1]))
            )
            before = matrix_of_d([block.get(i, result) for i in sources[2]])
            after = registers_of_d(multiply(left, right, before, kind, bool(found[2])))
            for target, values in zip(targets, after, strict=True):
                block.put(target, np.ascontiguousarray(values), result)

        return run

    def _wgmma(self, instruction: Instruction) -> Run:
        action = instruction.parts[1]
        if action == "commit_group":
            return self._commit(lambda block: block.products)
        return {"fence": wgmma.fence, "wait_group": wgmma.wait, "mma_async": wgmma.multiplication}[action](
            self, instruction
        )
