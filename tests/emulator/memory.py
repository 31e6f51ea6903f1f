"""Global and shared memory, and what is wrong about accesses to them.

Accesses take addresses of the threads that take part, one row of bytes a thread. A wrong one is noted and goes on: what
is read out of bounds is 0xEE, what is written there is dropped.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Array = np.ndarray
POISON = 0xEE  # what memory holds that nobody wrote
KINDS = ("race", "out of bounds", "misaligned", "uninitialised", "order")


class Fault(Exception):
    """The program cannot go on, or does what the emulator does not have."""


@dataclass
class Findings:
    """How often each kind was seen (by threads), and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    where: Callable[[], str] = lambda: ""  # the instruction that runs now

    def note(self, kind: str, what: str, count: int = 1) -> None:
        """Note `count` of a kind."""
        self.counts[kind] += count
        where = self.where()
        self.examples.setdefault((kind, where), f"{kind}: {what}, {where}")

    def check_alignment(self, address: Array, size: int, what: str) -> None:
        """Note what does not lie at multiples of its size."""
        if (address % size).any():
            self.note("misaligned", f"{what} of {size} bytes", int(np.count_nonzero(address % size)))


# ------------------------------------------------------------------------------------------------- global memory


@dataclass
class _Region:
    """Memory from the first to the last byte of tensors that overlap."""

    start: int
    end: int
    data: Array
    readable: Array  # which bytes belong to a tensor
    writable: Array

    def __post_init__(self) -> None:
        self.all_readable, self.all_writable = bool(self.readable.all()), bool(self.writable.all())


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class GlobalMemory:
    """The elements of some tensors, in place; everything else is out of bounds.

    `inputs` are addresses of storages that may only be read.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], inputs: Collection[int], findings: Findings) -> None:
        self.findings = findings
        spans = sorted({_span(tensor) for tensor in tensors if tensor.numel()})
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.regions = []
        for start, end in merged:
            readable, writable = np.zeros(end - start, bool), np.zeros(end - start, bool)
            for tensor in tensors:
                if tensor.numel() and start <= tensor.data_ptr() < end:
                    may_write = tensor.untyped_storage().data_ptr() not in inputs
                    for mask in (readable, writable) if may_write else (readable,):
                        _elements(mask, tensor, tensor.data_ptr() - start)[...] = True
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
            self.regions.append(_Region(start, end, data, readable, writable))
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def _find(self, address: Array) -> tuple[_Region, Array] | None:
        """The region of the first address, and which others are in it."""
        i = int(np.searchsorted(self.starts, address[0], "right")) - 1
        if i < 0:
            return None
        region = self.regions[i]
        return region, (address >= region.start) & (address < region.end)

    def _each(self, address: Array, size: int, write: bool) -> list[tuple[_Region, Array, Array]]:
        """(region, places among `address`, bytes [places, size]) of all accesses that are allowed; notes the others."""
        what = f"global {'write' if write else 'read'}"
        self.findings.check_alignment(address, size, what)
        rest, found, lost = np.arange(len(address)), [], 0
        while len(rest):
            hit = self._find(address[rest])
            if hit is None:
                rest, lost = rest[1:], lost + 1
                continue
            region, inside = hit
            places = rest[inside] if inside.any() else rest[:1]
            rest = rest[~inside] if inside.any() else rest[1:]
            index = (address[places] - region.start)[:, None] + np.arange(size)
            allowed = (index[:, 0] >= 0) & (index[:, -1] < region.end - region.start)
            if not (region.all_writable if write else region.all_readable):
                own = region.writable if write else region.readable
                allowed &= own[np.clip(index, 0, len(own) - 1)].all(1)
            if not allowed.all():
                lost += int(np.count_nonzero(~allowed))
                places, index = places[allowed], index[allowed]
            if len(places):
                found.append((region, places, index))
        if lost:
            self.findings.note("out of bounds", what, lost)
        return found

    def read(self, address: Array, size: int) -> Array:
        """Bytes [addresses, size]."""
        out = np.full((len(address), size), POISON, np.uint8)
        for region, places, index in self._each(address, size, False):
            out[places] = region.data[index]
        return out

    def write(self, address: Array, data: Array) -> None:
        """Write bytes [addresses, size]; of several threads at one address, the last."""
        for region, places, index in self._each(address, data.shape[1], True):
            region.data[index] = data[places]

    def update(self, address: Array, size: int, change: Callable[[int, Array], Array]) -> Array:
        """Replace the bytes at each address, one thread after the other, by change(thread, bytes); returns the old."""
        out = np.full((len(address), size), POISON, np.uint8)
        for region, places, index in self._each(address, size, True):
            for place, where in zip(places, index, strict=True):
                out[place] = region.data[where]
                region.data[where] = change(int(place), out[place].copy())
        return out


def _elements(mask: Array, tensor: torch.Tensor, offset: int) -> Array:
    """The bytes of `mask` that are elements of the tensor, which begins at `offset`."""
    size = tensor.element_size()
    shape, strides = (*tensor.shape, size), (*(size * stride for stride in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(mask[offset:], shape, strides)


# ------------------------------------------------------------------------------------------------- shared memory

NOBODY, SEVERAL = -1, -2


class _Accesses:
    """The latest access to each granule: by which thread and warp (or SEVERAL), and when.

    Barriers of the block end an epoch; these and barriers of a warp end an interval of that warp.
    """

    def __init__(self, granules: int) -> None:
        self.epoch = np.full(granules, -1)
        self.interval = np.full(granules, -1)
        self.warp = np.full(granules, NOBODY)
        self.thread = np.full(granules, NOBODY)

    def unordered(self, granule: Array, thread: Array, epoch: int, interval: Array) -> Array:
        """Which granules another thread accessed with no barrier since that orders it before `thread` now."""
        now = self.epoch[granule] == epoch
        if not now.any():
            return now
        ordered = (self.warp[granule] == thread // 32) & (self.interval[granule] < interval)
        return now & ~ordered & (self.thread[granule] != thread)

    def add(self, granule: Array, thread: Array, epoch: int, interval: Array) -> None:
        warp = thread // 32
        now = self.epoch[granule] == epoch
        if now.any():
            others = now & (self.warp[granule] != warp)
            joined = now & (self.interval[granule] == interval) & (self.thread[granule] != thread)
            warp, thread = np.where(others, SEVERAL, warp), np.where(others | joined, SEVERAL, thread)
        self.epoch[granule], self.interval[granule] = epoch, interval
        self.warp[granule], self.thread[granule] = warp, thread
        # Of several threads at one granule, the last was kept.
        self.warp[granule[self.warp[granule] != warp]] = SEVERAL
        self.thread[granule[self.thread[granule] != thread]] = SEVERAL


class SharedMemory:
    """Shared memory of one block with a race detector, in granules of `granule` bytes (the least access).

    A race is an access to what another thread wrote, or a write to what another thread accessed, with no barrier
    between, or an access to the target of a copy (cp.async) or the operand of a product (wgmma) before they were
    waited for. Writing what is there already is no race.
    """

    START = 1024  # the address of the first byte

    def __init__(self, size: int, granule: int, threads: int, findings: Findings) -> None:
        self.size, self.granule, self.findings = size, granule, findings
        self.data = np.full(size, POISON, np.uint8)
        granules = -(-size // granule)
        self.written = np.zeros(granules, bool)
        self.copying = np.zeros(granules, np.int32)  # copies under way
        self.multiplying = np.zeros(granules, np.int32)  # products under way that read it
        self.unfenced = np.zeros(granules, bool)  # written or copied by threads and not yet visible to wgmma
        self.reads, self.writes = _Accesses(granules), _Accesses(granules)
        self.epoch = 0
        self.interval = np.zeros(threads, np.int64)

    def barrier(self) -> None:
        """All threads have arrived."""
        self.epoch += 1
        self.interval += 1

    def warp_barrier(self, thread: Array) -> None:
        """The threads of some warps have arrived."""
        self.interval[thread] += 1

    def _granules(self, address: Array, size: int, thread: Array, what: str) -> tuple[Array, Array, Array, Array]:
        """(which accesses are within bounds, their bytes, their granules, the threads of those)."""
        self.findings.check_alignment(address, min(size, 16), what)
        address = address - self.START
        inside = (address >= 0) & (address + size <= self.size)
        if not inside.all():
            self.findings.note("out of bounds", what, int(np.count_nonzero(~inside)))
        address, thread = address[inside], thread[inside]
        index = address[:, None] + np.arange(size)
        each = max(1, size // self.granule)
        granule = (address // self.granule)[:, None] + np.arange(each)
        return inside, index, granule.ravel(), np.repeat(thread, each)

    def _race(self, what: str, bad: Array) -> None:
        if bad.any():
            self.findings.note("race", what, int(np.count_nonzero(bad)))

    def read(self, address: Array, size: int, thread: Array, what: str = "shared read") -> Array:
        """Bytes [addresses, size]."""
        inside, index, granule, thread = self._granules(address, size, thread, what)
        interval = self.interval[thread]
        self._race(f"{what} of what another thread wrote", self.writes.unordered(granule, thread, self.epoch, interval))
        self._race(f"{what} of what is being copied", self.copying[granule] > 0)
        unknown = ~self.written[granule] & (self.copying[granule] == 0)
        if unknown.any():
            self.findings.note("uninitialised", what, int(np.count_nonzero(unknown)))
        self.reads.add(granule, thread, self.epoch, interval)
        out = np.full((len(address), size), POISON, np.uint8)
        out[inside] = self.data[index]
        return out

    def write(self, address: Array, data: Array, thread: Array) -> None:
        """Write bytes [addresses, size]."""
        inside, index, granule, thread = self._granules(address, data.shape[1], thread, "shared write")
        data = data[inside]
        changed = (self.data[index] != data).reshape(len(granule), -1).any(1)
        self._check_write(granule, thread, changed, "shared write")
        self.data[index] = data
        twice = (self.data[index] != data).any(1)
        self._race("shared write by two threads at once", twice)
        self._written(granule, thread)
        self.unfenced[granule] = True

    def _check_write(self, granule: Array, thread: Array, changed: Array, what: str) -> None:
        interval = self.interval[thread]
        read = self.reads.unordered(granule, thread, self.epoch, interval)
        written = self.writes.unordered(granule, thread, self.epoch, interval)
        self._race(f"{what} to what another thread reads", read & changed)
        self._race(f"{what} to what another thread wrote", written & changed)
        self._race(f"{what} to what is being copied", self.copying[granule] > 0)
        self._race(f"{what} to what is being multiplied", self.multiplying[granule] > 0)

    def _written(self, granule: Array, thread: Array) -> None:
        self.written[granule] = True
        self.writes.add(granule, thread, self.epoch, self.interval[thread])

    def begin_copy(self, address: Array, data: Array, thread: Array) -> Callable[[bool], None]:
        """Begin to copy bytes [addresses, size] to here; the result performs it, with True also completes it."""
        inside, index, granule, thread = self._granules(address, data.shape[1], thread, "cp.async")
        data = data[inside]
        self._check_write(granule, thread, np.True_, "cp.async")
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
                self.reads.add(granule, np.full(len(granule), thread), self.epoch, self.interval[thread])
            late = data.copy()
            late[inside] = self.data[index]
            return late

        return data, end
