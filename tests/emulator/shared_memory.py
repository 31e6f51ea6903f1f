"""Shared memory of one block, with a race detector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .findings import POISON, Findings
from .races import Accesses, Clock

Array = np.ndarray


class SharedMemory:
    """Shared memory of one block with a race detector, in granules of `granule` bytes (the least access).

    A race is an access to what another thread wrote, or a write to what another thread accessed, with no barrier
    between, or an access to the target of a copy (cp.async) or the operand of a product (wgmma) before they were
    waited for. Writing what is there already is no race.
    """

    START = 1024  # the address of the first byte

    def __init__(self, size: int, granule: int, clock: Clock, findings: Findings) -> None:
        self.size, self.granule, self.clock, self.findings = size, granule, clock, findings
        self.data = np.full(size, POISON, np.uint8)
        granules = -(-size // granule)
        self.written = np.zeros(granules, bool)
        self.copying = np.zeros(granules, np.int32)  # copies under way
        self.multiplying = np.zeros(granules, np.int32)  # products under way that read it
        self.unfenced = np.zeros(granules, bool)  # written or copied by threads and not yet visible to wgmma
        self.reads, self.writes = Accesses(granules), Accesses(granules)

    def _granules(self, address: Array, size: int, thread: Array, what: str) -> tuple[Array, Array, Array, Array]:
        """(which accesses are within bounds, their bytes, their granules, the threads of those)."""
        self.findings.check_alignment(address, min(size, 16), what)
        address = address - self.START
        inside = (address >= 0) & (address + size <= self.size)
        self.findings.note_where("out of bounds", what, ~inside)
        address, thread = address[inside], thread[inside]
        index = address[:, None] + np.arange(size)
        each = max(1, size // self.granule)
        granule = (address // self.granule)[:, None] + np.arange(each)
        return inside, index, granule.ravel(), np.repeat(thread, each)

    def _race(self, what: str, bad: Array) -> None:
        self.findings.note_where("race", what, bad)

    def read(self, address: Array, size: int, thread: Array, what: str = "shared read") -> Array:
        """Bytes [addresses, size]."""
        inside, index, granule, thread = self._granules(address, size, thread, what)
        self._race(f"{what} of what another thread wrote", self.writes.unordered(granule, thread, self.clock))
        self._race(f"{what} of what is being copied", self.copying[granule] > 0)
        unknown = ~self.written[granule] & (self.copying[granule] == 0)
        self.findings.note_where("uninitialised", what, unknown)
        self.reads.add(granule, thread, self.clock)
        out = np.full((len(address), size), POISON, np.uint8)
        out[inside] = self.data[index]
        return out

    def write(self, address: Array, data: Array, thread: Array) -> None:
        """Write bytes [addresses, size]."""
        inside, index, granule, thread = self._granules(address, data.shape[1], thread, "shared write")
        if not inside.any():
            return
        data = data[inside]
        changed = (self.data[index] != data).reshape(len(granule), -1).any(1)
        self._check_write(granule, thread, changed, "shared write")
        self.data[index] = data
        twice = (self.data[index] != data).any(1)
        self._race("shared write by two threads at once", twice)
        self._written(granule, thread)
        self.unfenced[granule] = True

    def _check_write(self, granule: Array, thread: Array, changed: Array, what: str) -> None:
        read = self.reads.unordered(granule, thread, self.clock)
        written = self.writes.unordered(granule, thread, self.clock)
        self._race(f"{what} to what another thread reads", read & changed)
        self._race(f"{what} to what another thread wrote", written & changed)
        self._race(f"{what} to what is being copied", self.copying[granule] > 0)
        self._race(f"{what} to what is being multiplied", self.multiplying[granule] > 0)

    def _written(self, granule: Array, thread: Array) -> None:
        self.written[granule] = True
        self.writes.add(granule, thread, self.clock)

    def begin_copy(self, address: Array, data: Array, thread: Array) -> Callable[[bool], None]:
        """Begin to copy bytes [addresses, size] to here; the result performs it, with True also completes it."""
        inside, index, granule, thread = self._granules(address, data.shape[1], thread, "cp.async")
        data = data[inside]
        self._check_write(granule, thread, np.ones(len(granule), bool), "cp.async")
        self.copying[granule] += 1
        self.data[index] = POISON

        def perform(complete: bool) -> None:
            self.data[index] = data
            if complete:
                self.copying[granule] -= 1
                self._written(granule, thread)
                self.unfenced[granule] = True

        return perform

    def fence(self) -> None:
        """fence.proxy.async: what threads wrote and copied is visible to wgmma."""
        self.unfenced[:] = False

    def begin_product(self, address: Array, threads: Array) -> tuple[Array, Callable[[], Array]]:
        """A product of `threads` (one of each warp) reads 16 bytes at each address until it is waited for.

        Returns the bytes as they are now, and what is to be called at the wait and returns them as they are then.
        """
        data = self.read(address, 16, np.full(len(address), threads[0]), "wgmma operand")
        inside, index, granule, _ = self._granules(address, 16, np.full(len(address), threads[0]), "wgmma operand")
        if self.unfenced[granule].any():
            self.findings.note("order", "wgmma operand written without fence.proxy.async")
        np.add.at(self.multiplying, granule, 1)

        def end() -> Array:
            np.subtract.at(self.multiplying, granule, 1)
            for thread in threads:
                self.reads.add(granule, np.full(len(granule), thread), self.clock)
            late = data.copy()
            late[inside] = self.data[index]
            return late

        return data, end
