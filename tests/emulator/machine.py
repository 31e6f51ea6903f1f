"""One block of threads (CTA): its registers, its shared memory, and the loop that executes instructions.

All threads that are at the same place execute an instruction together. Where they part, those at the lowest place go
first, until they meet again. What is asynchronous (cp.async, wgmma) happens at once with `early=True`, else when it is
waited for: a program that is right gives the same either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import BITS, decode, encode
from .findings import Fault, Findings
from .global_memory import GlobalMemory
from .races import Clock
from .shared_memory import SharedMemory

Array = np.ndarray
LIMIT = 300_000  # instructions of a block, after which it is taken not to end


@dataclass(frozen=True)
class Step:
    """An instruction, ready to run: `run` returns where it branches to, or None."""

    run: Callable[[Block], int | None]
    predicate: int | None
    negated: bool
    touched: frozenset[int]  # registers read and written
    written: tuple[int, ...]
    branches: bool
    text: str


@dataclass(frozen=True)
class Kernel:
    """An assembled program."""

    name: str
    parameters: dict[str, str]
    threads: int
    steps: list[Step]
    widths: list[int]  # bytes of each register, 0 for predicates
    constants: dict[int, Array]  # registers that hold immediate operands
    specials: dict[str, int]  # %tid.x, ... -> register
    granule: int  # bytes of the least access to shared memory


@dataclass
class Product:
    """A wgmma under way."""

    registers: frozenset[int]
    complete: Callable[[], None]


@dataclass
class Groups:
    """What is asynchronous: things begun, in groups as they were committed."""

    open: list = field(default_factory=list)
    committed: list[list] = field(default_factory=list)

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, pending: int) -> list:
        """Take out all but the `pending` latest groups."""
        due = self.committed[: max(0, len(self.committed) - pending)]
        del self.committed[: len(due)]
        return [thing for group in due for thing in group]


class Block:
    """The state of one block. `place` and `grid` are (x, y, z)."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        arguments: dict[str, bytes],
        shared: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        early: bool,
        findings: Findings,
    ) -> None:
        self.kernel, self.memory, self.arguments, self.early, self.findings = kernel, memory, arguments, early, findings
        T = kernel.threads
        x, y, z = place
        self.clock = Clock((z * grid[1] + y) * grid[0] + x, T)
        self.shared = SharedMemory(shared, kernel.granule, self.clock, findings)
        self.thread = np.arange(T)
        unknown = {width: np.full(T, 0xDEADBEEF_DEADBEEF & (1 << 8 * width) - 1, BITS[width]) for width in BITS}
        unknown[0] = np.zeros(T, bool)
        self.registers: list[Array] = [unknown[width] for width in kernel.widths]
        for index, constant in kernel.constants.items():
            self.registers[index] = constant
        values = {"tid.x": self.thread, "laneid": self.thread % 32, "warpid": self.thread // 32, "ntid.x": T}
        values |= {f"ctaid.{axis}": own for axis, own in zip("xyz", place, strict=True)}
        values |= {f"nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        values |= {"tid.y": 0, "tid.z": 0, "ntid.y": 1, "ntid.z": 1}
        for name, index in kernel.specials.items():
            self.registers[index] = np.full(T, values[name[1:]], np.uint32)
        self.everyone = np.ones(T, bool)
        self.active = self.everyone  # threads that run the instruction
        self.all = True  # whether those are all
        self.copies, self.products = Groups(), Groups()
        self.busy: frozenset[int] = frozenset()  # registers of products under way
        self.changed: set[int] = set()  # registers written since the last wgmma.fence
        self.waiting: list[tuple[int, Array]] = []  # (next place, threads) at the barrier
        self.count = 0
        self.at = 0
        findings.where = lambda: kernel.steps[self.at].text

    # ------------------------------------------------------------------------------- for the instructions

    def get(self, index: int, kind: str) -> Array:
        """The values [threads] of a register."""
        return decode(self.registers[index], kind)

    def put(self, index: int, values: Array, kind: str) -> None:
        """Set a register of the active threads."""
        bits = encode(values, kind, self.kernel.widths[index])
        self.registers[index] = bits if self.all else np.where(self.active, bits, self.registers[index])

    def put_lanes(self, index: int, lanes: Array, values: Array, kind: str) -> None:
        """Set a register of some threads to as many values."""
        bits = encode(values, kind, self.kernel.widths[index])
        if len(lanes) < len(self.thread):
            whole = self.registers[index].copy()
            whole[lanes] = bits
            bits = whole
        self.registers[index] = bits

    def lanes(self) -> Array:
        """The active threads."""
        return self.thread if self.all else np.flatnonzero(self.active)

    def whole_warps(self, what: str) -> Array:
        """The active threads, which have to be whole warps."""
        lanes = self.lanes()
        if not self.all and (self.active.reshape(-1, 32).any(1) != self.active.reshape(-1, 32).all(1)).any():
            raise Fault(f"{what} by a part of a warp, {self.findings.where()}")
        return lanes

    def need_all(self, what: str) -> None:
        """All threads have to be active."""
        if not self.all:
            raise Fault(f"{what} by a part of the threads, {self.findings.where()}")

    def arrive(self) -> None:
        """bar.sync 0 of the active threads."""
        if self.all:
            self.clock.barrier()
        else:
            self.waiting.append((self.at + 1, self.active))

    # ------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Execute the program.

        Raises:
            Fault: what the emulator does not have, a barrier that not all threads reach, or no end.
        """
        groups: dict[int, Array] = {0: self.everyone}  # place -> threads there
        end = len(self.kernel.steps)
        while groups or self.waiting:
            if not groups:
                self._release(groups)
            at = min(groups)
            threads = groups.pop(at)
            until = min(groups, default=end)
            whole = bool(threads.all())
            while at < until:
                step = self.kernel.steps[at]
                self.at, self.count = at, self.count + 1
                if self.count > LIMIT:
                    raise Fault(f"no end after {LIMIT} instructions")
                self.active, self.all = threads, whole
                if step.predicate is not None:
                    chosen = self.registers[step.predicate]
                    self.active = threads & (~chosen if step.negated else chosen)
                    self.all = bool(self.active.all())
                    if not self.all and not self.active.any():
                        at += 1
                        continue
                if self.busy and not self.busy.isdisjoint(step.touched):
                    self.findings.note("race", "a register of a wgmma under way")
                target = step.run(self)
                if not step.branches:
                    self.changed.update(step.written)
                    at += 1
                    if self.waiting and self.waiting[-1][0] == at:
                        threads = threads & ~self.active
                        groups[at] = threads
                        break
                    continue
                staying = threads & ~self.active
                if target is not None and target < end:
                    groups[target] = groups[target] | self.active if target in groups else self.active
                if staying.any():
                    groups[at + 1] = groups[at + 1] | staying if at + 1 in groups else staying
                break
            else:
                if at < end:
                    groups[at] = groups[at] | threads
            groups = {place: own for place, own in groups.items() if own.any()}

    def _release(self, groups: dict[int, Array]) -> None:
        """Let go of the threads at the barrier, where all must be."""
        arrived = np.logical_or.reduce([threads for _, threads in self.waiting])
        if not arrived.all():
            raise Fault(f"a barrier that {np.count_nonzero(~arrived)} threads never reach")
        for place, threads in self.waiting:
            groups[place] = groups[place] | threads if place in groups else threads
        self.waiting = []
        self.clock.barrier()
